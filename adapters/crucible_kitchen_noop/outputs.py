"""What the toy model says at each position, and the derivatives by its weights.

Knows the table of logits and the value of each token, not sessions. Read next: ``crucible_kitchen_noop.model``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from crucible_kitchen.types import Array, Datum, Float64Array
from crucible_kitchen_noop.model import log_softmax

__all__ = ["Weights", "backward", "compute", "likeliest"]


@dataclass(frozen=True)
class Weights:
    """A copy of the weights as the outputs need them.

    Attributes:
        table: logits [V, V].
        values: of each token [V]; None without a value head.
    """

    table: Float64Array
    values: Float64Array | None = None


def compute(weights: Weights, datum: Datum, wanted: Collection[str]) -> dict[str, Float64Array]:
    """Return outputs of one datum; ``top_logprobs`` of its ``teacher_tokens``."""
    logits = weights.table[datum.inputs["tokens"]]
    every = log_softmax(logits)
    found: dict[str, Float64Array] = {}
    if "logprobs" in wanted:
        found["logprobs"] = every[np.arange(len(every)), datum.loss_inputs["target_tokens"]]
    if "values" in wanted and weights.values is not None:
        found["values"] = weights.values[datum.inputs["tokens"]]
    if "entropy" in wanted:
        found["entropy"] = -(np.exp(every) * every).sum(axis=-1)
    if "top_logprobs" in wanted:
        found["top_logprobs"] = np.take_along_axis(every, datum.loss_inputs["teacher_tokens"], axis=-1)
    if "logits" in wanted:
        found["logits"] = logits
    return found


def likeliest(weights: Weights, datum: Datum, k: int) -> tuple[Array, Float64Array]:
    """Return the k likeliest tokens of each position, the likeliest first, and their log-probabilities; [T, k] each."""
    every = log_softmax(weights.table[datum.inputs["tokens"]])
    best = np.argsort(-every, axis=-1, kind="stable")[:, :k]
    return best, np.take_along_axis(every, best, axis=-1)


def backward(weights: Weights, datum: Datum, slopes: Mapping[str, Float64Array], into: Float64Array) -> None:
    """Add the derivative by the weights, given those by outputs, to ``into`` [V, V + 1]: table and values."""
    tokens = datum.inputs["tokens"]
    every = log_softmax(weights.table[tokens])
    p, rows = np.exp(every), np.arange(len(tokens))
    d_logits = np.zeros_like(every)
    with np.errstate(all="ignore"):  # what is not finite is found, and named, when the step is applied
        if "logprobs" in slopes:
            d = slopes["logprobs"]
            d_logits -= d[:, None] * p
            d_logits[rows, datum.loss_inputs["target_tokens"]] += d
        if "entropy" in slopes:
            entropy = -(p * every).sum(axis=-1, keepdims=True)
            d_logits -= slopes["entropy"][:, None] * p * (every + entropy)
        if "top_logprobs" in slopes:
            d = slopes["top_logprobs"]
            d_logits -= d.sum(axis=-1, keepdims=True) * p
            np.add.at(d_logits, (rows[:, None], datum.loss_inputs["teacher_tokens"]), d)
        if "logits" in slopes:
            d_logits += slopes["logits"]
        np.add.at(into[:, :-1], tokens, d_logits)
        if "values" in slopes:
            np.add.at(into[:, -1], tokens, slopes["values"])
