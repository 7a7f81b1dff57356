"""From datums to gradients: micro-batches under a token budget, and sums in a fixed order.

Knows models and losses, not optimizers or sessions. Read next: ``logprobs.py`` and ``trainer.py``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from crucible_kitchen.errors import BackendUserError, TrainingError
from crucible_kitchen.learner.terms import of_outputs
from crucible_kitchen.types import Array, Datum, Float64Array, Loss, OutputsLoss, OutputsLossValue
from crucible_kitchen_torch.logprobs import token_logprobs
from crucible_kitchen_torch.microbatches import plan, plan_padded
from crucible_kitchen_torch.models import CausalModel
from crucible_kitchen_torch.placement import Placement

__all__ = ["Accumulation", "Pass", "check_datums", "combine_metrics"]


def check_datums(datums: Sequence[Datum], needed: Sequence[str], vocab_size: int, context: int) -> None:
    """Check that the model can take these datums.

    Raises:
        BackendUserError: an input is missing or of the wrong shape, a sequence is empty or longer than the context, or
            a token is outside the vocabulary.
    """
    for datum in datums:
        problem = _problem(datum, needed, vocab_size, context)
        if problem:
            raise BackendUserError(f"datum {datum.key!r} {problem}")


def _problem(datum: Datum, needed: Sequence[str], vocab_size: int, context: int) -> str:
    tokens = datum.inputs.get("tokens")
    if tokens is None or tokens.ndim != 1 or not len(tokens):
        return "needs a non-empty input `tokens` of shape [T]"
    if len(tokens) > context:
        return f"has {len(tokens)} tokens, but the model's context is {context}"
    for name in needed:
        if name not in datum.loss_inputs:
            return f"lacks the loss input {name!r}"
        if datum.loss_inputs[name].shape != tokens.shape:
            return f"has {name!r} of another shape than `tokens`"
    ids = (tokens, datum.loss_inputs["target_tokens"]) if "target_tokens" in needed else (tokens,)
    if any(int(i.min()) < 0 or int(i.max()) >= vocab_size for i in ids):
        return f"has a token outside the vocabulary of {vocab_size}"
    return ""


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


@dataclass(slots=True)
class Pass:
    """One forward, with or without backward, over datums, a micro-batch at a time.

    Iterate over ``run()``; each turn is one micro-batch of work. Then read the results.

    Args:
        model: the model.
        datums: what to compute.
        loss: ``cross_entropy``, a loss, or None for log-probabilities without gradient.
        budget: positions per micro-batch.
        batches: indices of the datums of each micro-batch; None plans them.
        place: in which numbers; None computes in those of the weights.
    """

    model: CausalModel
    datums: Sequence[Datum]
    loss: str | Loss | OutputsLoss | None
    budget: int
    batches: Sequence[list[int]] | None = None
    place: Placement | None = None
    logprobs: list[Array] = field(init=False)
    totals: list[float] = field(default_factory=list)
    metrics: list[Mapping[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.logprobs = [np.full(len(d), np.nan, dtype=np.float32) for d in self.datums]
        if len(self.datums) % self.group:
            raise BackendUserError(f"the loss takes groups of {self.group} datums, got {len(self.datums)}")
        if self.batches is None:
            split = plan_padded if self.model.pads else plan
            self.batches = split([len(d) for d in self.datums], self.group, self.budget)

    @property
    def group(self) -> int:
        """How many consecutive datums the loss takes at once."""
        return 1 if self.loss is None or isinstance(self.loss, str) else self.loss.group

    @property
    def total(self) -> float:
        """The loss summed over all datums; exact, so that splits cannot change it."""
        return math.fsum(self.totals)

    def run(self) -> Iterator[None]:
        """Compute, one micro-batch per turn."""
        for batch in self.batches or ():
            with torch.set_grad_enabled(self.loss is not None):  # left before the turn ends: it belongs to the thread
                self._compute(batch)
            yield

    def _compute(self, batch: list[int]) -> None:
        """Run one micro-batch; gradients go where autograd puts them."""
        chosen = [self._chosen(self.datums[i]) for i in batch]
        counts = [len(c) for c in chosen]
        if not sum(counts):
            return
        device = next(self.model.module.parameters()).device
        lengths = [len(self.datums[i]) for i in batch]
        tokens = np.concatenate([self.datums[i].inputs["tokens"] for i in batch]).astype(np.int64, copy=False)
        wanted = [self.datums[i].loss_inputs["target_tokens"][c] for i, c in zip(batch, chosen, strict=True)]
        targets = torch.from_numpy(np.concatenate(wanted).astype(np.int64)).to(device)
        with self.place.numbers() if self.place else nullcontext():
            hidden = self.model.hidden(torch.from_numpy(tokens).to(device), lengths)
            if sum(counts) < len(tokens):
                starts = np.cumsum([0, *lengths[:-1]])
                at = np.concatenate([c + start for c, start in zip(chosen, starts, strict=True)])
                hidden = hidden[torch.from_numpy(at).to(device)]
            out = token_logprobs(hidden, self.model.head, targets, self.model.facts.vocab_size)
        found = np.split(out.detach().double().cpu().numpy(), np.cumsum(counts)[:-1])
        for i, c, values in zip(batch, chosen, found, strict=True):
            self.logprobs[i][c] = values
        if self.loss is not None:
            slope = np.concatenate(self._slopes(batch, chosen, found))
            # A scalar: with a gradient given, torch imports sympy to compare shapes, a third of a second once.
            torch.autograd.backward((out * torch.from_numpy(slope).to(device=device, dtype=out.dtype)).sum())

    def _chosen(self, datum: Datum) -> Array:
        """Return the positions to compute: those with weight for cross-entropy, all for everything else."""
        if isinstance(self.loss, str):
            return np.flatnonzero(datum.loss_inputs["weights"])
        return np.arange(len(datum))

    def _slopes(self, batch: list[int], chosen: list[Array], found: list[Float64Array]) -> list[Float64Array]:
        """Evaluate the loss; return d loss / d logprobs of each datum's chosen positions."""
        if self.loss is None or isinstance(self.loss, str):
            weights = [
                self.datums[i].loss_inputs["weights"][c].astype(np.float64) for i, c in zip(batch, chosen, strict=True)
            ]
            self.totals += [-float(w @ values) for w, values in zip(weights, found, strict=True)]
            return [-w for w in weights]
        slopes: list[Float64Array] = []
        for start in range(0, len(batch), self.group):
            members = slice(start, start + self.group)
            value = self._value(self.loss, found[members], [self.datums[i] for i in batch[members]])
            self.totals.append(value.total)
            self.metrics.append(value.metrics)
            slopes += [own["logprobs"] for own in value.slopes]
        return slopes

    def _value(
        self, loss: Loss | OutputsLoss, logprobs: Sequence[Float64Array], datums: Sequence[Datum]
    ) -> OutputsLossValue:
        try:
            value = of_outputs(loss)([{"logprobs": found} for found in logprobs], [d.loss_inputs for d in datums])
        except Exception as error:
            raise TrainingError(f"the loss {loss.name!r} raised {type(error).__name__}") from error
        if [np.shape(own["logprobs"]) for own in value.slopes] != [(len(d),) for d in datums]:
            raise TrainingError(
                f"the loss {loss.name!r} returned derivatives of another shape than its log-probabilities"
            )
        return value


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
