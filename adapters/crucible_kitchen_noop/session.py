"""A training session on the toy model that keeps every promise of the training port.

Its calls run one after the other in the session's task group, on the event loop: the arrays are small. Only states and
exports touch files. Read next: ``crucible_kitchen_noop.model``.
"""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError, NonFiniteLoss, SessionLost
from crucible_kitchen.learner.terms import of_outputs
from crucible_kitchen.ports import Pending, Policy, TrainingCapabilities, needed_inputs, require_outputs
from crucible_kitchen.types import (
    AdamParams,
    Datum,
    ExportedModel,
    ForwardBackwardResult,
    ForwardResult,
    Loss,
    OptimResult,
    OutputsLoss,
    SessionInfo,
    SessionSpec,
    StateRef,
)
from crucible_kitchen.workers import Submissions, run_sync
from crucible_kitchen_noop.export import write_model
from crucible_kitchen_noop.losses import CrossEntropy, check_datum, collected, evaluate, summarise
from crucible_kitchen_noop.model import Accumulation, BigramModel
from crucible_kitchen_noop.outputs import Weights, backward, compute, likeliest
from crucible_kitchen_noop.sampler import CONTEXT_LENGTH, NoopSampler
from crucible_kitchen_noop.state import delete_state, read_state, write_state
from crucible_kitchen_noop.tokenizer import VOCAB_SIZE, ByteTokenizer

__all__ = ["NoopSession"]

R = TypeVar("R")


@dataclass(eq=False)
class _Scope:
    """The opened accumulation of one step; ``replay`` gives the stored answer of a step that was applied before."""

    session: "NoopSession"
    index: int
    replay: OptimResult | None = None
    sum: Accumulation = field(default_factory=Accumulation)
    closed: bool = False
    applied: bool = False

    async def forward_backward(
        self, datums: Sequence[Datum], loss: str | Loss | OutputsLoss = "cross_entropy", *, order: int | None = None
    ) -> Pending[ForwardBackwardResult]:
        """See ``TrainingStepScope``."""
        self._check_open()
        function = self.session._loss(loss)
        require_outputs(self.session.capabilities, function.reads)
        if order is not None and not self.session.capabilities.ordered_accumulation:
            raise CapabilityError("this backend adds gradients in the order of arrival", hint="leave out order=")
        if len(datums) % function.group:
            raise BackendUserError(f"the loss {function.name!r} takes groups of {function.group} datums")
        needed = (*needed_inputs(function.reads), *(["weights"] if isinstance(loss, str) else []))
        for datum in datums:
            check_datum(datum, needed, VOCAB_SIZE, self.session.info.context_length)
        return await self.session._submit(lambda: self.session._accumulate(self, list(datums), function, order))

    async def apply(self, params: AdamParams, *, scale: float = 1.0) -> Pending[OptimResult]:
        """See ``TrainingStepScope``."""
        self._check_open()
        self.session._check_scale(scale)
        self.applied = True
        return await self.session._submit(lambda: self.session._apply(self, params, scale))

    def _check_open(self) -> None:
        if self.closed or self.applied:
            raise BackendUserError(f"step {self.index} is {'closed' if self.closed else 'applied'}, open the next one")


class NoopSession:
    """One toy model being trained. Made by ``NoopTrainingClient.open_session``.

    Args:
        spec: what the session was opened on.
        capabilities: what it can do.
        submissions: the task group of its calls.
        latency: seconds each call takes.
    """

    def __init__(
        self, spec: SessionSpec, capabilities: TrainingCapabilities, submissions: Submissions, latency: float
    ) -> None:
        self._spec = spec
        self._capabilities = replace(
            capabilities,
            value_head=spec.value_head,
            reference=spec.reference,
        )
        self._submissions = submissions
        self._latency = latency
        self._tokenizer = ByteTokenizer()
        self._model = BigramModel(self._tokenizer.vocab_size, spec.seed, spec.lora, value_head=spec.value_head)
        self._reference = self._weights()
        self._rng = np.random.default_rng([spec.seed, 1])
        self._scope: _Scope | None = None
        self._scale: float | None = None
        self._last: OptimResult | None = None
        self._closed = False

    @property
    def info(self) -> SessionInfo:
        """Facts about the toy model."""
        trained = sum(w.size for w in self._model.weights.values())
        lora = self._spec.lora
        return SessionInfo(
            model=self._spec.model,
            architecture="bigram",
            parameters=self._model.base.size + (trained if lora else 0),
            trainable_parameters=trained,
            context_length=CONTEXT_LENGTH,
            vocab_size=self._tokenizer.vocab_size,
            hidden_size=self._tokenizer.vocab_size,
            lora_rank=lora.rank if lora else 0,
            device="cpu",
            dtype="float64",
        )

    @property
    def tokenizer(self) -> ByteTokenizer:
        """Bytes."""
        return self._tokenizer

    @property
    def capabilities(self) -> TrainingCapabilities:
        """The client's, without what the session was not opened with."""
        return self._capabilities

    @property
    def position(self) -> int:
        """Optimizer steps applied so far."""
        return self._model.steps

    @asynccontextmanager
    async def step(self, index: int) -> AsyncGenerator[_Scope, None]:
        """Open accumulation ``index``, once all calls before it have ended."""
        scope = await (await self._submit(lambda: self._begin(index)))
        try:
            yield scope
        finally:
            scope.closed = True

    async def forward(
        self,
        datums: Sequence[Datum],
        *,
        outputs: Collection[str] = ("logprobs",),
        top: int = 0,
        reference: bool = False,
    ) -> Pending[ForwardResult]:
        """See ``TrainingSession``."""
        require_outputs(self._capabilities, outputs)
        if reference and not self._spec.reference:
            raise CapabilityError("this session keeps no reference", hint="open it with reference=True")
        if "top_logprobs" in outputs and not 1 <= top <= self._tokenizer.vocab_size:
            raise BackendUserError(f"top must be from 1 to {self._tokenizer.vocab_size}, got {top}")
        for datum in datums:
            needed = ("target_tokens",) if "logprobs" in outputs else ()
            check_datum(datum, needed, self._tokenizer.vocab_size, CONTEXT_LENGTH)
        return await self._submit(lambda: self._forward(list(datums), frozenset(outputs), top, reference))

    async def save_state(self, name: str) -> Pending[StateRef]:
        """Write a state below the session's directory; what follows waits for it."""

        async def save() -> StateRef:
            meta = {"step": self.position, "rng": self._rng.bit_generator.state}
            return await run_sync(write_state, Path(self._spec.directory), name, self._model.arrays(), meta)

        return await self._submit(save)

    async def load_state(self, state: StateRef) -> None:
        """Restore a state bit for bit."""

        async def load() -> None:
            arrays, meta = await self._read(state)
            self._model.restore(arrays, meta["step"])
            self._rng.bit_generator.state = meta["rng"]
            self._scope = self._last = None

        await (await self._submit(load))

    async def load_weights(self, state: StateRef) -> None:
        """Take over a state's weights; the optimizer begins anew."""

        async def load() -> None:
            arrays, _ = await self._read(state)
            moments = {name: np.zeros_like(array) for name, array in arrays.items() if name[:2] in ("m.", "v.")}
            self._model.restore(arrays | moments, 0)
            self._scope = self._last = None

        await (await self._submit(load))

    async def _read(self, state: StateRef) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays, meta = await run_sync(read_state, state)
        if not self._model.fits(arrays):
            raise BackendUserError("the state is of another kind of session", hint="open it with the same lora")
        return arrays, meta

    async def delete_state(self, state: StateRef) -> None:
        """Remove a state's file."""
        await run_sync(delete_state, Path(self._spec.directory), state)

    async def sampler(self) -> NoopSampler:
        """Return a sampler of a copy of the weights."""
        if not self._capabilities.sampling:
            raise CapabilityError("this backend cannot sample", hint="give a sampling_client")

        async def snapshot() -> NoopSampler:
            return NoopSampler(
                self._model.table(),
                self.position,
                lambda: int(self._rng.integers(2**62)),
                is_open=lambda: not self._closed,
                latency=self._latency,
                values=self._model.values(),
            )

        return await (await self._submit(snapshot))

    async def policy(self) -> Policy:
        """Refuse: the toy model takes tokens."""
        raise CapabilityError("this model takes tokens, not observations", hint="use session.sampler()")

    async def export(self, directory: str) -> ExportedModel:
        """Write the table of logits and a description."""
        if not self._capabilities.export:
            raise CapabilityError("this backend cannot export its weights")

        async def export() -> ExportedModel:
            return await run_sync(write_model, Path(directory), self._model.table(), self._spec.model, self.position)

        return await (await self._submit(export))

    def close(self) -> None:
        """Refuse all further calls."""
        self._closed = True

    async def _submit(self, call: Callable[[], Awaitable[R]]) -> Pending[R]:
        if self._closed:
            raise SessionLost("the session is closed")

        @functools.wraps(call)
        async def run() -> R:
            await anyio.sleep(self._latency)
            return await call()

        await anyio.lowlevel.checkpoint()
        return self._submissions.submit(run)

    async def _begin(self, index: int) -> _Scope:
        replay = self._last if index == self.position - 1 and self._capabilities.recovery == "step_token" else None
        if index != self.position and replay is None:
            raise BackendUserError(
                f"step {index} cannot be opened at position {self.position}", hint="open step(session.position)"
            )
        self._scope = _Scope(self, index, replay)
        return self._scope

    def _loss(self, loss: str | Loss | OutputsLoss) -> OutputsLoss:
        if not isinstance(loss, str):
            if self._capabilities.custom_loss == "refused":
                raise CapabilityError(f"this backend takes no custom loss such as {loss.name!r}")
            return of_outputs(loss)
        if loss not in self._capabilities.losses:
            known = ", ".join(sorted(self._capabilities.losses))
            raise CapabilityError(f"this backend has no loss {loss!r}", hint=f"built in: {known}")
        return of_outputs(CrossEntropy())

    def _weights(self) -> Weights:
        return Weights(self._model.table(), self._model.values())

    def _check_scale(self, scale: float) -> None:
        kept = self._capabilities.step_scale
        if kept == "none" and scale != 1.0:
            raise CapabilityError("this backend does not scale", hint="scale the weights before submission")
        if kept == "constant" and self._scale not in (None, scale):
            raise CapabilityError("this backend keeps one scale for a whole run", hint="scale the weights instead")
        self._scale = scale

    async def _forward(self, datums: list[Datum], wanted: frozenset[str], top: int, reference: bool) -> ForwardResult:
        weights = self._reference if reference else self._weights()
        found: list[dict[str, Any]] = []
        for datum in datums:
            own: dict[str, Any] = dict(compute(weights, datum, wanted - {"top_logprobs"}))
            if "top_logprobs" in wanted:
                own["top_tokens"], own["top_logprobs"] = likeliest(weights, datum, top)
            found.append(own)
            await anyio.lowlevel.checkpoint()
        outputs = collected(found)
        return ForwardResult(outputs.pop("logprobs", []), outputs)

    async def _accumulate(
        self, scope: _Scope, datums: list[Datum], loss: OutputsLoss, order: int | None
    ) -> ForwardBackwardResult:
        if order is not None and scope.sum.taken(order):
            raise BackendUserError(f"a gradient of order {order} was submitted already")
        weights = self._weights()
        gradient = np.zeros((len(weights.table), len(weights.table) + 1))
        outputs = []
        for datum in datums:
            outputs.append(compute(weights, datum, loss.reads))
            await anyio.lowlevel.checkpoint()
        values = []
        for start in range(0, len(datums), loss.group):
            group = slice(start, start + loss.group)
            value = evaluate(loss, outputs[group], datums[group])
            for datum, slopes in zip(datums[group], value.slopes, strict=True):
                backward(weights, datum, slopes, gradient)
            values.append(value)
            await anyio.lowlevel.checkpoint()
        result = summarise(values, outputs, datums)
        scope.sum.add(gradient, order)
        scope.sum.keys += [datum.key for datum in datums]
        scope.sum.finite &= bool(np.isfinite(result.loss))
        return result

    async def _apply(self, scope: _Scope, params: AdamParams, scale: float) -> OptimResult:
        if scope.replay is not None:
            return scope.replay
        if scope is not self._scope or scope.sum.calls == 0:
            raise BackendUserError(f"step {scope.index} has no gradient", hint="call forward_backward before apply")
        self._scope = None
        with np.errstate(all="ignore"):
            gradients = self._model.gradients(scope.sum.total() * scale)
            norm = float(np.sqrt(sum(float(np.sum(g * g)) for g in gradients.values())))
        if not scope.sum.finite or not np.isfinite(norm):
            raise NonFiniteLoss("the gradient" if scope.sum.finite else "the loss", scope.index + 1, scope.sum.keys)
        if 0 < params.grad_clip_norm < norm:
            gradients = {name: g * (params.grad_clip_norm / norm) for name, g in gradients.items()}
        self._model.apply(gradients, params)
        self._last = OptimResult(self.position, norm)
        return self._last
