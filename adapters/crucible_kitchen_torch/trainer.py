"""The executor's state and its computations, all of them synchronous and all in one thread, the session's lane.

Knows nothing of async code. Its invariant: between two calls no autograd graph is alive, so weights may be swapped.
Read next: ``session.py``, its async face.
"""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from crucible_kitchen.errors import BackendUserError, NonFiniteLoss, SessionLost
from crucible_kitchen.ports.training_client import needed_inputs
from crucible_kitchen.types import (
    AdamParams,
    Array,
    Datum,
    ExportedModel,
    ForwardBackwardResult,
    ForwardResult,
    JsonObject,
    Loss,
    OptimResult,
    OutputsLoss,
    SessionInfo,
    SessionSpec,
    StateRef,
    reads,
)
from crucible_kitchen_torch.accumulate import Accumulation, Asked, Pass, combine_metrics
from crucible_kitchen_torch.bases import BaseModels
from crucible_kitchen_torch.checks import check_datums, check_top
from crucible_kitchen_torch.faults import is_out_of_memory
from crucible_kitchen_torch.heads import ValueHead
from crucible_kitchen_torch.invariance import TOLERANCE, compare, other_split
from crucible_kitchen_torch.memory import peak_memory
from crucible_kitchen_torch.models import open_model, resolve
from crucible_kitchen_torch.optim import Adam
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.placement import placement
from crucible_kitchen_torch.randomness import SessionRng
from crucible_kitchen_torch.states import read_state
from crucible_kitchen_torch.weights import Snapshot, Weights

__all__ = ["Trainer"]

_END = object()
_log = logging.getLogger(__name__)

VERIFIED_PARAMETERS = 10**9
"""Larger models pass the invariance gate only when asked to: it costs one more gradient."""


class Trainer:
    """One model in training.

    Args:
        spec: what the session was opened on.
        options: the executor's.
        bases: where base models are shared; None shares nothing.

    Raises:
        ModelNotFound: there is no such model.
        CapabilityError: the LoRA asked for does not fit the model.
    """

    def __init__(self, spec: SessionSpec, options: TorchOptions, bases: BaseModels | None = None) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.place = placement(options)
        if options.deterministic:
            torch.use_deterministic_algorithms(mode=True)
        self.reproducible = options.deterministic or self.place.device.type == "cpu"
        self._spec = spec
        self.options = options
        self.budget = options.tokens_per_microbatch
        self.rng = SessionRng(spec.seed, self.place.device)
        with self.rng.borrow():
            self.model = open_model(spec, self.place, bases or BaseModels())
        self._module = self.model.module.eval()
        self.value = self._value_head()
        self._dropouts = [m for n, m in self._module.named_modules() if "lora_dropout" in n and _drops(m)]
        head = {f"value_head.{n}": p for n, p in self.value.named_parameters()} if self.value is not None else {}
        trained = {n: p for n, p in self._module.named_parameters() if p.requires_grad} | head
        fixed = {n: p for n, p in self._module.named_parameters() if n not in trained and self.model.from_seed}
        self.weights = Weights(trained, fixed, reference=spec.reference)
        self._adam = Adam(trained)
        self._verify = options.verify_invariance
        self._notes: dict[str, float] = {}  # metrics of the next step
        self._halved = False
        self.position = 0

    @property
    def info(self) -> SessionInfo:
        """Facts about the model."""
        facts = self.model.facts
        return SessionInfo(
            model=self._spec.model,
            architecture=facts.architecture,
            parameters=sum(p.numel() for p in self._module.parameters()) + self._head_size(),
            trainable_parameters=sum(p.numel() for p in self.weights.trained.values()),
            context_length=facts.context_length,
            vocab_size=facts.vocab_size,
            hidden_size=facts.hidden_size,
            lora_rank=self._spec.lora.rank if self._spec.lora else 0,
            device=str(self.place.device),
            dtype=str(self.place.dtype).removeprefix("torch."),
        )

    def _value_head(self) -> ValueHead | None:
        """Return the value head of a session that asked for one, or whose model was exported with one."""
        exported = resolve(self._spec.model) if self._spec.mlp is None else None
        if not self._spec.value_head and not ValueHead.is_in(exported):
            return None
        head = ValueHead(self.model.value_width, self.place.device, self.place.weights)
        head.read(exported)
        return head

    def _head_size(self) -> int:
        return sum(p.numel() for p in self.value.parameters()) if self.value is not None else 0

    def _values(self, hidden: Tensor) -> Tensor:
        assert self.value is not None
        return self.value(self.model.valued(hidden))  # type: ignore[no-any-return]

    def gradient(
        self, datums: Sequence[Datum], loss: str | Loss | OutputsLoss, into: Accumulation, order: int | None
    ) -> Iterator[ForwardBackwardResult | None]:
        """Add the gradient of the summed loss to an accumulation, one micro-batch per turn; the result comes last.

        The accumulation is touched at the end only: what is broken off leaves nothing behind.
        """
        self._check(datums, ("target_tokens", "weights") if isinstance(loss, str) else needed_inputs(reads(loss)))
        into.admit(order)
        halved = self._halved
        work = yield from self._backward(datums, loss)
        into.keys += (keys := [d.key for d in datums])
        if not math.isfinite(work.total):
            raise NonFiniteLoss("the loss", self.position + 1, keys)
        grads = self.weights.take_gradients()
        if self._gate_is_due(work):
            yield from self._pass_gate(work, grads)
        into.add(grads, order)
        said = [{"microbatch_halved": 1.0}] if self._halved and not halved else []
        yield ForwardBackwardResult(
            loss=work.total,
            weight=math.fsum(_weight(d) for d in datums),
            tokens=sum(len(d) for d in datums),
            logprobs=work.logprobs,
            metrics=combine_metrics([*work.metrics, *said]),
            outputs=_besides_logprobs(work),
        )

    def _backward(
        self, datums: Sequence[Datum], loss: str | Loss | OutputsLoss | None, batches: Sequence[list[int]] | None = None
    ) -> Generator[None, None, Pass]:
        """Compute a gradient, where autograd puts it; given micro-batches are computed without dropout.

        The first lack of memory halves the micro-batches, for this call and all later ones.
        """
        while True:
            work = Pass(self.model, datums, loss, self.budget, batches, self.place, self._values)
            self.weights.forget_gradients()
            try:
                yield from work.run() if batches else self._in_training_mode(work.run())
            except Exception as error:
                self.weights.forget_gradients()
                if not is_out_of_memory(error) or not self._halve(work):
                    raise
            else:
                return work

    def _halve(self, work: Pass) -> bool:
        """Halve the micro-batches if that was not done before and helps."""
        batches = work.batches or ()
        most = max(sum(len(work.datums[i]) for i in b) for b in batches)
        if self._halved or all(len(b) == work.group for b in batches):
            return False
        self._halved = True
        self.budget = max(1, min(self.budget, most) // 2)
        _log.warning("not enough memory: micro-batches are halved, to %d positions", self.budget)
        return True

    def _gate_is_due(self, work: Pass) -> bool:
        if self._verify == "off" or self.position or len(work.datums) < 2 * work.group:
            return False
        if self._verify == "on":
            return True
        small = sum(p.numel() for p in self._module.parameters()) < VERIFIED_PARAMETERS
        return small and self.place.device.type == "cpu" and self.place.dtype == torch.float32

    def _pass_gate(self, work: Pass, grads: list[Tensor]) -> Generator[None, None, None]:
        """Compute the gradient again with other micro-batches, and without dropout with the same ones, and compare.

        Raises:
            TrainingError: they differ by more than rounding.
        """
        began = time.perf_counter()
        batches = work.batches or ()
        if self._dropouts:
            yield from self._backward(work.datums, work.loss, batches)
            grads = self.weights.take_gradients()
        yield from self._backward(work.datums, work.loss, other_split(batches, work.group))
        difference = compare(
            list(self.weights.trained), grads, self.weights.take_gradients(), TOLERANCE[self.place.dtype]
        )
        self._verify = "off"  # once in a session
        self._notes = {"invariance_check_s": time.perf_counter() - began, "invariance_difference": difference}

    def forward(self, datums: Sequence[Datum], at: Snapshot | None = None) -> Iterator[list[Array] | None]:
        """Compute target log-probabilities, one micro-batch per turn; the result comes last."""
        for found in self.outputs(datums, frozenset({"logprobs"}), at=at):
            yield None if found is None else list(found.logprobs)

    def outputs(
        self, datums: Sequence[Datum], names: frozenset[str], top: int = 0, at: Snapshot | None = None
    ) -> Iterator[ForwardResult | None]:
        """Compute outputs without gradient, one micro-batch per turn; the result comes last.

        Args:
            datums: of what.
            names: which outputs.
            top: k of ``top_logprobs``.
            at: under which weights; None: the live ones.
        """
        self._check(datums, ("target_tokens",) if "logprobs" in names else ())
        if "top_logprobs" in names:
            check_top(top, self.model.facts)
        asked = Asked(names, top, self._still(self.position), lambda: self.weights.as_of(at))
        work = Pass(self.model, datums, None, self.budget, place=self.place, value=self._values, asked=asked)
        turns = work.run()
        while True:
            with self.weights.as_of(at):
                done = next(turns, _END) is _END
            if done:
                break
            yield None
        yield ForwardResult(work.logprobs, _besides_logprobs(work))

    def _still(self, position: int) -> Callable[[], None]:
        def check() -> None:
            if self.position != position:
                raise SessionLost(
                    f"these logits are of step {position}, and the session is at step {self.position}",
                    hint="read them before the next step, or ask for them again",
                )

        return check

    def _check(self, datums: Sequence[Datum], needed: Sequence[str]) -> None:
        check_datums(datums, needed, self.model.facts)

    def _in_training_mode(self, work: Iterator[None]) -> Iterator[None]:
        """Turn the adapters' dropout on during each turn; the base model's own dropout stays off.

        Base models are frozen or fine-tuned as they are served: their dropout would make a gradient depend on how the
        batch was split.
        """
        while True:
            if self._dropouts:
                with self.rng.borrow(), _training(self._dropouts):
                    done = next(work, _END) is _END
            else:
                done = next(work, _END) is _END
            if done:
                return
            yield

    def apply(self, accumulated: Accumulation, params: AdamParams, scale: float) -> OptimResult:
        """Take one optimizer step with an accumulated gradient.

        Raises:
            BackendUserError: nothing was accumulated.
            NonFiniteLoss: the gradient is not finite; the weights are as they were.
        """
        grads = accumulated.total()
        if grads is None:
            raise BackendUserError(f"step {self.position} has no gradient to apply", hint="call forward_backward first")
        norm = self._adam.norm(grads, scale)
        if not math.isfinite(norm):
            raise NonFiniteLoss("the gradient", self.position + 1, accumulated.keys)
        self.weights.will_change()
        self._adam.apply(grads, norm, params)
        self.position += 1
        notes, self._notes = self._notes, {}
        return OptimResult(self.position, norm, peak_memory(self.place.device) | notes)

    def snapshot(self) -> Snapshot:
        """Return the weights as they are now, held once more."""
        return self.weights.snapshot(self.position)

    @property
    def directory(self) -> Path:
        """Where states are saved."""
        return Path(self._spec.directory)

    @torch.no_grad()
    def copy_state(self) -> tuple[dict[str, Tensor], JsonObject]:
        """Copy the weights (those that train, where the others are found elsewhere), moments and random state."""
        tensors: dict[str, Tensor] = {f"weights/{n}": t for n, t in self.weights.tensors().items()}
        tensors |= {f"adam/{key}": t for key, t in self._adam.tensors().items()}
        tensors |= {f"rng/{key}": t for key, t in self.rng.tensors().items()}
        facts: JsonObject = {
            "format": 1,
            "step": self.position,
            "model": self._spec.model,
            "seed": self.rng.seed,
            "requests": self.rng.requests,
        }
        return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}, facts

    def load(self, state: StateRef) -> None:
        """Restore a state; nothing is changed unless all of it fits.

        Raises:
            IntegrityError: its bytes are not those that were saved.
            BackendUserError: it is the state of another model.
        """
        tensors, facts = self._take_weights(state)
        self._adam.restore(_below("adam/", tensors))
        self.rng.restore(_below("rng/", tensors), int(facts["seed"]), int(facts["requests"]))
        self.position = int(facts["step"])

    def load_weights(self, state: StateRef) -> None:
        """Take over the weights of a state and begin the optimizer anew; raises as :meth:`load` does."""
        self._take_weights(state)
        self._adam.restore({})
        self.position = 0

    @torch.no_grad()
    def _take_weights(self, state: StateRef) -> tuple[dict[str, Tensor], JsonObject]:
        """Take over the weights of a state; return all that it holds."""
        tensors, facts = read_state(state)
        weights = _below("weights/", tensors)
        if not self.weights.fit(weights):
            raise BackendUserError(
                f"the state is one of {facts['model']!r} with other trained weights",
                hint="open the session with the model and LoRA the state was saved with",
            )
        self.weights.restore(weights)
        return tensors, facts

    def export(self, directory: str) -> ExportedModel:
        """Write the model for use elsewhere.

        Raises:
            BackendUserError: the directory does not exist or is not empty.
        """
        path = Path(directory)
        if not path.is_dir() or any(path.iterdir()):
            raise BackendUserError("export needs a directory that exists and is empty", hint="make a new directory")
        exported = self.model.export(path)
        if self.value is None:
            return exported
        return replace(exported, files=(*exported.files, self.value.save(path)))


def _besides_logprobs(work: Pass) -> dict[str, list[Array]]:
    return {name: found for name, found in work.outputs.items() if name != "logprobs"}


def _weight(datum: Datum) -> float:
    weights = datum.loss_inputs.get("weights")
    return float(len(datum)) if weights is None else float(weights.sum(dtype="float64"))


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0


@contextmanager
def _training(modules: Sequence[nn.Module]) -> Iterator[None]:
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
