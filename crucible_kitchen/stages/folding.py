"""A step's scale, multiplied into its gradient before it is submitted, for backends that do not scale at the step.

Possible wherever the whole batch is known first. Knows losses, no session. Read next:
``crucible_kitchen.stages.training``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from crucible_kitchen.types import (
    Array,
    Datum,
    Float64Array,
    Loss,
    LossValue,
    Output,
    OutputsLoss,
    OutputsLossValue,
)

__all__ = ["folded"]

L = TypeVar("L", Loss, OutputsLoss)


def folded(
    parts: Sequence[Sequence[Datum]], loss: str | Loss | OutputsLoss, scale: float
) -> tuple[Sequence[Sequence[Datum]], str | Loss | OutputsLoss]:
    """Return data and a loss whose sum is ``scale`` times that of the given ones; its metrics are the same.

    Built-in losses are linear in ``weights``, which are multiplied; a loss of ours is multiplied itself.
    """
    if isinstance(loss, str):
        return [[_weighted(datum, scale) for datum in part] for part in parts], loss
    if hasattr(loss, "reads"):
        return parts, _ScaledOutputsLoss(loss, scale)  # type: ignore[arg-type]
    return parts, _ScaledLoss(loss, scale)


def _weighted(datum: Datum, scale: float) -> Datum:
    weights = datum.loss_inputs.get("weights")
    given = np.ones(len(datum), np.float32) if weights is None else weights
    return replace(datum, loss_inputs={**datum.loss_inputs, "weights": given * np.float32(scale)})


@dataclass(frozen=True)
class _Scaled(Generic[L]):
    """A loss, times a number."""

    inner: L
    scale: float

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def group(self) -> int:
        return self.inner.group


class _ScaledLoss(_Scaled[Loss]):
    """A loss of log-probabilities, times a number."""

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]], /) -> LossValue:
        value = self.inner(logprobs, loss_inputs)
        return LossValue(value.total * self.scale, [d * self.scale for d in value.d_logprobs], value.metrics)


class _ScaledOutputsLoss(_Scaled[OutputsLoss]):
    """A loss of outputs, times a number."""

    @property
    def reads(self) -> frozenset[Output]:
        return self.inner.reads

    def __call__(
        self, outputs: Sequence[Mapping[str, Float64Array]], loss_inputs: Sequence[Mapping[str, Array]], /
    ) -> OutputsLossValue:
        value = self.inner(outputs, loss_inputs)
        slopes = [{name: slope * self.scale for name, slope in each.items()} for each in value.slopes]
        return OutputsLossValue(value.total * self.scale, slopes, value.metrics)
