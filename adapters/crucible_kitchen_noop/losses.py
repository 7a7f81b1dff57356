"""Losses of the toy model: the built-in cross entropy, checks of what losses read, and how their values combine.

Knows no session. Read next: ``crucible_kitchen_noop.session``.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from crucible_kitchen.errors import BackendUserError
from crucible_kitchen.types import (
    Array,
    Datum,
    Float64Array,
    ForwardBackwardResult,
    LossValue,
    OutputsLoss,
    OutputsLossValue,
)

__all__ = ["CrossEntropy", "check_datum", "collected", "evaluate", "summarise"]


class CrossEntropy:
    """``-sum(weights * logprobs)``."""

    name = "cross_entropy"
    group = 1

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one datum."""
        weights = loss_inputs[0]["weights"].astype(np.float64)
        return LossValue(-float(np.sum(weights * logprobs[0])), [-weights])


def check_datum(datum: Datum, needed: Sequence[str], vocab: int, context: int) -> None:
    """Refuse a datum that lacks an input, has one of another length, or tokens outside the vocabulary."""
    if "tokens" not in datum.inputs:
        raise BackendUserError(f"datum {datum.key!r} has no input 'tokens'")
    if len(datum) > context:
        raise BackendUserError(f"datum {datum.key!r} has {len(datum)} tokens, the context holds {context}")
    for name in needed:
        if name not in datum.loss_inputs:
            raise BackendUserError(f"datum {datum.key!r} lacks the loss input {name!r}")
        shape, given = (len(datum),), datum.loss_inputs[name].shape
        if (given[:1] if name == "teacher_tokens" else given) != shape or len(given) > 2:
            raise BackendUserError(f"datum {datum.key!r}: loss input {name!r} is not of length {len(datum)}")
    for ids in (datum.inputs["tokens"], *(datum.loss_inputs[name] for name in needed if name.endswith("_tokens"))):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise BackendUserError(f"datum {datum.key!r} has a token outside the vocabulary of {vocab}")


def evaluate(
    loss: OutputsLoss, outputs: Sequence[Mapping[str, Float64Array]], datums: Sequence[Datum]
) -> OutputsLossValue:
    """Evaluate the loss of one group and check what it returned."""
    try:
        with np.errstate(all="ignore"):  # what is not finite is found, and named, when the step is applied
            value = loss(outputs, [datum.loss_inputs for datum in datums])
    except Exception as error:
        raise BackendUserError(f"the loss {loss.name!r} raised {type(error).__name__}") from error
    shapes = [{name: np.shape(d) for name, d in slopes.items()} for slopes in value.slopes]
    if shapes != [{name: np.shape(found) for name, found in own.items()} for own in outputs]:
        raise BackendUserError(f"the loss {loss.name!r} returned derivatives of shapes {shapes}")
    return value


def summarise(
    values: Sequence[OutputsLossValue], outputs: Sequence[Mapping[str, Float64Array]], datums: Sequence[Datum]
) -> ForwardBackwardResult:
    """Combine the groups of one call into its result."""
    weights = [float(np.sum(d.loss_inputs["weights"])) if "weights" in d.loss_inputs else len(d) for d in datums]
    found = collected(outputs)
    return ForwardBackwardResult(
        loss=sum(value.total for value in values),
        weight=float(sum(weights)),
        tokens=sum(len(datum) for datum in datums),
        logprobs=found.pop("logprobs", []),
        metrics=_metrics(values),
        outputs={name: arrays for name, arrays in found.items() if name != "logits"},
    )


def collected(outputs: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
    """Return per output what is given per datum."""
    return {name: [own[name] for own in outputs] for name in (outputs[0] if outputs else ())}


def _metrics(values: Sequence[OutputsLossValue]) -> dict[str, float]:
    """Combine metrics as their names say: ``:mean``, ``:min``, ``:max``, else the sum."""
    collected: dict[str, list[float]] = {}
    for value in values:
        for name, number in value.metrics.items():
            collected.setdefault(name, []).append(number)
    return {name: _combine(name.rpartition(":")[2], numbers) for name, numbers in collected.items()}


def _combine(how: str, numbers: Sequence[float]) -> float:
    if how == "min":
        return float(min(numbers))
    if how == "max":
        return float(max(numbers))
    return float(sum(numbers) / (len(numbers) if how == "mean" else 1))
