"""From datums to gradients: micro-batches under a token budget, and sums in a fixed order.

Knows models and losses, not optimizers or sessions. Read next: ``outputs.py`` and ``trainer.py``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crucible_kitchen.errors import BackendUserError, TrainingError
from crucible_kitchen.learner.numerics import spread
from crucible_kitchen.learner.terms import of_outputs
from crucible_kitchen.types import Array, Datum, Float64Array, Loss, OutputsLoss, reads
from crucible_kitchen_torch.logits import Logits
from crucible_kitchen_torch.microbatches import plan, shared_beginnings
from crucible_kitchen_torch.models import CausalModel
from crucible_kitchen_torch.outputs import Wanted, pieces, scores_of, token_outputs
from crucible_kitchen_torch.placement import Placement
from crucible_kitchen_torch.unpadded import Joins, among_many

__all__ = ["Accumulation", "Asked", "Pass", "combine_metrics"]

LOGITS_AT_ONCE = 1 << 21
"""Scores given to a loss of logits at once: 16 MB in float64, of which it makes a dozen copies."""


class Accumulation:
    """The gradient of one optimizer step, added up in a fixed order.

    Floating-point sums depend on their order. Gradients with an ``order`` are added as 0, 1, 2, ...: an early one waits
    in its own buffers. Without, they are added as they come. Used in the lane's thread only.
    """

    def __init__(self) -> None:
        self._sum: list[Tensor] | None = None
        self._waiting: dict[int, list[Tensor]] = {}
        self._next = 0
        self._ordered: bool | None = None
        self.keys: list[str] = []

    def admit(self, order: int | None) -> None:
        """Check an order before its gradient is computed.

        Raises:
            BackendUserError: the order was used before, or calls with and without order are mixed.
        """
        ordered = order is not None
        if self._ordered not in (None, ordered):
            raise BackendUserError("calls with and without `order` cannot be mixed in one step")
        if order is not None and (order < self._next or order in self._waiting):
            raise BackendUserError(f"order {order} was already used in this step")
        self._ordered = ordered

    def add(self, grads: list[Tensor], order: int | None) -> None:
        """Add one call's gradient; takes the buffers over."""
        if order is None:
            self._merge(grads)
            return
        self._waiting[order] = grads
        while self._next in self._waiting:
            self._merge(self._waiting.pop(self._next))
            self._next += 1

    def _merge(self, grads: list[Tensor]) -> None:
        if self._sum is None:
            self._sum = grads
        else:
            torch._foreach_add_(self._sum, grads)

    def total(self) -> list[Tensor] | None:
        """Return the sum, what still waits added in order; None if nothing was added."""
        for order in sorted(self._waiting):
            self._merge(self._waiting.pop(order))
        return self._sum


@dataclass(frozen=True, slots=True)
class Asked:
    """What a forward pass without a loss is to give.

    Attributes:
        outputs: names of outputs.
        top: k of ``top_logprobs``.
        check: raises once logits that are read later would be those of other weights.
        weights: puts the weights in place that logits are read under later.
    """

    outputs: frozenset[str] = frozenset({"logprobs"})
    top: int = 0
    check: Callable[[], None] = lambda: None
    weights: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(slots=True)
class Pass:
    """One forward, with or without backward, over datums, a micro-batch at a time.

    Iterate over ``run()``; each turn is one micro-batch of work. Then read the results.

    Args:
        model: the model.
        datums: what to compute.
        loss: ``cross_entropy``, a loss, or None for outputs without gradient.
        budget: positions per micro-batch.
        batches: indices of the datums of each micro-batch; None plans them.
        place: in which numbers; None computes in those of the weights.
        value: maps hidden states [M, D] to values [M]; None without a value head.
        asked: what to give without a loss.
    """

    model: CausalModel
    datums: Sequence[Datum]
    loss: str | Loss | OutputsLoss | None
    budget: int
    batches: Sequence[list[int]] | None = None
    place: Placement | None = None
    value: Callable[[Tensor], Tensor] | None = None
    asked: Asked = Asked()
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    totals: list[float] = field(default_factory=list)
    metrics: list[Mapping[str, float]] = field(default_factory=list)
    shared: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.datums) % self.group:
            raise BackendUserError(f"the loss takes groups of {self.group} datums, got {len(self.datums)}")
        if "logprobs" in self.names:
            self._room("logprobs", ())
        self.shared = shared_beginnings(self.datums, self.group) if self.model.shares and self.group > 1 else {}
        if self.batches is None:
            self.batches = plan([self._own(i) for i in range(len(self.datums))], self.group, self.budget)

    @property
    def group(self) -> int:
        """How many consecutive datums the loss takes at once."""
        return 1 if self.loss is None or isinstance(self.loss, str) else self.loss.group

    @property
    def names(self) -> frozenset[str]:
        """The outputs to compute."""
        return self.asked.outputs if self.loss is None else reads(self.loss)

    @property
    def logprobs(self) -> list[Array]:
        """Log-probabilities of the targets, float32 [T] per datum, NaN where they were not computed."""
        return self.outputs.get("logprobs", [])

    @property
    def total(self) -> float:
        """The loss summed over all datums; exact, so that splits cannot change it."""
        return math.fsum(self.totals)

    def run(self) -> Iterator[None]:
        """Compute, one micro-batch per turn."""
        for number, batch in enumerate(self.batches or ()):
            if number:
                yield
            with torch.set_grad_enabled(self.loss is not None):  # left before the turn ends: it belongs to the thread
                self._compute(batch)

    def _compute(self, batch: list[int]) -> None:
        """Run one micro-batch; gradients go where autograd puts them."""
        chosen = [self._chosen(self.datums[i]) for i in batch]
        if not any(len(c) for c in chosen):
            return
        with self._numbers():
            hidden = self._hidden(batch, chosen)
        if self.loss is not None and "logits" in self.names:
            self._backward_in_pieces(batch, chosen, hidden)
            return
        with self._numbers():
            found = self._outputs(hidden, batch, chosen)
        arrays = self._kept(found, batch, chosen)
        if self.loss is None:
            if "logits" in self.names:
                self._keep_logits(hidden, batch, chosen)
            return
        _backward(found, self._slopes(batch, chosen, arrays))

    def _numbers(self) -> AbstractContextManager[None]:
        return self.place.numbers() if self.place else nullcontext()

    def _chosen(self, datum: Datum) -> Array:
        """Return the positions to compute: all, or those with weight where the loss reads no others."""
        weights = datum.loss_inputs.get("weights")
        if weights is None or not (isinstance(self.loss, str) or hasattr(self.loss, "reads")):
            return np.arange(len(datum))
        return np.flatnonzero(weights)

    def _own(self, i: int) -> int:
        """Return how many positions of a datum are computed for it alone."""
        return len(self.datums[i]) - self.shared.get(i, 0)

    def _hidden(self, batch: list[int], chosen: list[Array]) -> Tensor:
        """Return hidden states [M, D] of the chosen positions, datum by datum.

        What a datum shares with the first of its group is computed there.
        """
        lengths = [self._own(i) for i in batch]
        starts = np.cumsum([0, *lengths[:-1]])
        skipped = [self.shared.get(i, 0) for i in batch]
        read = self.model.facts.reads
        given = np.concatenate([self.datums[i].inputs[read][s:] for i, s in zip(batch, skipped, strict=True)])
        if not any(skipped):
            hidden = self._states(given, lengths)
            if sum(len(c) for c in chosen) == len(given):
                return hidden
        else:
            joins = {row: (row - i % self.group, s) for row, (i, s) in enumerate(zip(batch, skipped, strict=True)) if s}
            hidden = self._states(given, lengths, joins)
        at = [
            np.where(c < s, starts[row - i % self.group] + c, starts[row] + c - s)
            for row, (i, s, c) in enumerate(zip(batch, skipped, chosen, strict=True))
        ]
        return hidden[self._tensor(np.concatenate(at))]

    def _states(self, given: Array, lengths: list[int], *joins: Joins) -> Tensor:
        def hidden(rows: Tensor) -> Tensor:
            return self.model.hidden(rows, lengths * (len(rows) // len(given)), *joins)

        return among_many(hidden, self._tensor(given), len(given))

    def _head(self, hidden: Tensor) -> Tensor:
        return among_many(self.model.head, hidden, len(hidden))

    def _tensor(self, values: Array) -> Tensor:
        """Return integers as int64, other numbers in those of the weights, on the model's device."""
        weight = next(self.model.module.parameters())
        whole = np.issubdtype(values.dtype, np.integer)
        return torch.from_numpy(values).to(weight.device, torch.int64 if whole else weight.dtype)

    def _outputs(self, hidden: Tensor, batch: list[int], chosen: list[Array]) -> dict[str, Tensor]:
        """Return the outputs of chosen positions but for the logits, [M] or [M, k] each."""
        names, top = self.names, self.asked.top if self.loss is None else 0
        named = "top_logprobs" in names and not top
        wanted = Wanted("logprobs" in names, "entropy" in names, named, top if "top_logprobs" in names else 0)
        targets = self._inputs("target_tokens", batch, chosen) if wanted.logprobs else None
        teacher = self._inputs("teacher_tokens", batch, chosen) if wanted.named else None
        found = token_outputs(hidden, self._head, wanted, self.model.facts.vocab_size, targets, teacher)
        if "values" in names:
            assert self.value is not None
            found["values"] = self.value(hidden)
        return found

    def _inputs(self, name: str, batch: list[int], chosen: list[Array]) -> Tensor:
        wanted = [self.datums[i].loss_inputs[name][c] for i, c in zip(batch, chosen, strict=True)]
        return self._tensor(np.concatenate(wanted).astype(np.int64))

    def _room(self, name: str, width: tuple[int, ...]) -> list[Any]:
        """Return what is kept of an output, one array per datum, made when it is first needed."""
        if name not in self.outputs:
            kind, nothing = (np.int64, -1) if name == "top_tokens" else (np.float32, np.nan)
            self.outputs[name] = [np.full((len(d), *width), nothing, dtype=kind) for d in self.datums]
        return self.outputs[name]

    def _kept(self, found: Mapping[str, Tensor], batch: list[int], chosen: list[Array]) -> dict[str, list[Array]]:
        """Keep outputs as results and return those of each datum's chosen positions, in float64."""
        cuts = np.cumsum([len(c) for c in chosen])[:-1]
        arrays: dict[str, list[Array]] = {}
        for name, tensor in found.items():
            whole = tensor.detach().cpu()
            arrays[name] = np.split((whole if name == "top_tokens" else whole.double()).numpy(), cuts)
            room = self._room(name, tuple(tensor.shape[1:]))
            for i, c, values in zip(batch, chosen, arrays[name], strict=True):
                room[i][c] = values
        return arrays

    def _keep_logits(self, hidden: Tensor, batch: list[int], chosen: list[Array]) -> None:
        kept = self.outputs.setdefault("logits", [None] * len(self.datums))
        for i, part in zip(batch, torch.split(hidden, [len(c) for c in chosen]), strict=True):
            kept[i] = Logits(part.clone(), self._later, self.model.facts.vocab_size, self.asked.check)

    def _later(self, hidden: Tensor) -> Tensor:
        with self.asked.weights(), self._numbers():
            return self._head(hidden)

    def _slopes(
        self, batch: list[int], chosen: list[Array], found: Mapping[str, list[Float64Array]]
    ) -> dict[str, Float64Array]:
        """Evaluate the loss; return d loss / d output of the chosen positions, datum by datum."""
        assert self.loss is not None
        if isinstance(self.loss, str):
            weights = [
                self.datums[i].loss_inputs["weights"][c].astype(np.float64) for i, c in zip(batch, chosen, strict=True)
            ]
            self.totals += [-float(w @ values) for w, values in zip(weights, found["logprobs"], strict=True)]
            return {"logprobs": -np.concatenate(weights)}
        slopes: list[Mapping[str, Float64Array]] = []
        for start in range(0, len(batch), self.group):
            members = slice(start, start + self.group)
            datums = [self.datums[i] for i in batch[members]]
            whole = [
                {
                    name: spread(values[start + j], c, (len(d), *values[start + j].shape[1:]))
                    for name, values in found.items()
                }
                for j, (d, c) in enumerate(zip(datums, chosen[members], strict=True))
            ]
            slopes += self._evaluate(self.loss, whole, [d.loss_inputs for d in datums])
        return {name: np.concatenate([own[name][c] for own, c in zip(slopes, chosen, strict=True)]) for name in found}

    def _backward_in_pieces(self, batch: list[int], chosen: list[Array], hidden: Tensor) -> None:
        """Evaluate a loss of logits on pieces of datums and send the gradient back, the scores of one piece at a time.

        The output layer's gradient is complete after the last piece, the states' then goes back at once.
        """
        grads: list[Tensor] = []
        for i, c, states in zip(batch, chosen, torch.split(hidden, [len(c) for c in chosen]), strict=True):
            for at, _ in pieces(len(c), self.model.facts.vocab_size, LOGITS_AT_ONCE):
                leaf = states[at].detach().requires_grad_()
                with self._numbers():
                    found = self._outputs(leaf, [i], [c[at]])
                    found["logits"] = scores_of(self._head, leaf)
                arrays = {name: parts[0] for name, parts in self._kept(found, [i], [c[at]]).items()}
                inputs = {name: values[c[at]] for name, values in self.datums[i].loss_inputs.items()}
                assert self.loss is not None
                assert not isinstance(self.loss, str)
                (slopes,) = self._evaluate(self.loss, [arrays], [inputs])
                _backward(found, slopes)
                grads.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        if hidden.requires_grad:
            torch.autograd.backward((hidden * torch.cat(grads)).sum())

    def _evaluate(
        self,
        loss: Loss | OutputsLoss,
        outputs: Sequence[Mapping[str, Float64Array]],
        inputs: Sequence[Mapping[str, Array]],
    ) -> Sequence[Mapping[str, Float64Array]]:
        """Evaluate one group, add up its total and metrics, and return its derivatives."""
        try:
            value = of_outputs(loss)(outputs, inputs)
        except Exception as error:
            raise TrainingError(f"the loss {loss.name!r} raised {type(error).__name__}") from error
        shapes = [{name: np.shape(d) for name, d in own.items()} for own in value.slopes]
        if shapes != [{name: found.shape for name, found in own.items()} for own in outputs]:
            raise TrainingError(f"the loss {loss.name!r} returned derivatives of another shape than what it was given")
        self.totals.append(value.total)
        self.metrics.append(value.metrics)
        return value.slopes


def _backward(found: Mapping[str, Tensor], slopes: Mapping[str, Float64Array]) -> None:
    """Send derivatives by outputs back through the model."""
    # A scalar: with a gradient given, torch imports sympy to compare shapes, a third of a second once.
    parts = [
        (found[name] * torch.from_numpy(slope).to(device=found[name].device, dtype=found[name].dtype)).sum()
        for name, slope in slopes.items()
        if found[name].requires_grad
    ]
    if parts:
        torch.autograd.backward(sum(parts[1:], parts[0]))


def combine_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of groups: sums, or what the end of a key says (``:mean``, ``:min``, ``:max``)."""
    values: dict[str, list[float]] = {}
    for part in parts:
        for key, value in part.items():
            values.setdefault(key, []).append(float(value))
    return {key: _combine(key, found) for key, found in values.items()}


def _combine(key: str, found: list[float]) -> float:
    if key.endswith(":min"):
        return min(found)
    if key.endswith(":max"):
        return max(found)
    total = math.fsum(found)
    return total / len(found) if key.endswith(":mean") else total
