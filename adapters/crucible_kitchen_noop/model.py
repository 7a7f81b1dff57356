"""A language model small enough for tests and real enough to learn: a bigram softmax in float64 numpy.

``p(next | current) = softmax(table[current])``, trained on sums of gradients by AdamW. It knows no session and no
file. Read next: ``crucible_kitchen_noop.session``.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crucible_kitchen.types import AdamParams, Array, Float64Array, IntArray, LoraSpec

__all__ = ["Accumulation", "BigramModel", "log_softmax", "token_logprobs"]


def log_softmax(logits: Float64Array) -> Float64Array:
    """Return the log-probabilities of logits [..., V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Float64Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def token_logprobs(table: Float64Array, tokens: IntArray, targets: IntArray) -> Float64Array:
    """Return [T]: the log-probability of each target after its token."""
    result: Float64Array = log_softmax(table[tokens])[np.arange(len(tokens)), targets]
    return result


@dataclass
class Accumulation:
    """The gradient of one step while it is being added up.

    Gradients with an ``order`` are added in that order whatever the order of arrival: an early one waits in its own
    buffer. Those without are added as they come.
    """

    keys: list[str] = field(default_factory=list)
    finite: bool = True
    calls: int = 0
    _ordered: Float64Array | float = 0.0
    _unordered: Float64Array | float = 0.0
    _next: int = 0
    _early: dict[int, Float64Array] = field(default_factory=dict)

    def add(self, gradient: Float64Array, order: int | None) -> None:
        """Add one call's gradient."""
        self.calls += 1
        if order is None:
            self._unordered = self._unordered + gradient
            return
        self._early[order] = gradient
        while (waiting := self._early.pop(self._next, None)) is not None:
            self._ordered = self._ordered + waiting
            self._next += 1

    def taken(self, order: int) -> bool:
        """Return whether a gradient of this order is in already."""
        return order < self._next or order in self._early

    def total(self) -> Float64Array:
        """Return the sum."""
        ordered = self._ordered
        for order in sorted(self._early):
            ordered = ordered + self._early[order]
        return np.asarray(ordered + self._unordered, dtype=np.float64)


class BigramModel:
    """The weights, their gradient and their optimizer.

    Args:
        vocab: number of tokens V.
        seed: of the initial weights.
        lora: train ``alpha / rank * B A`` beside a frozen table instead of the table.
        value_head: also train a value of each token, 0 at first.
    """

    def __init__(self, vocab: int, seed: int, lora: LoraSpec | None, *, value_head: bool = False) -> None:
        rng = np.random.default_rng([seed, 0])
        self.base: Float64Array = rng.normal(0.0, 0.02, (vocab, vocab))
        self.factor = 0.0
        self.weights: dict[str, Float64Array] = {"table": self.base.copy()}
        if lora is not None:
            self.factor = lora.alpha / lora.rank
            down = rng.normal(0.0, lora.rank**-0.5, (lora.rank, vocab))
            self.weights = {"lora_a": down, "lora_b": np.zeros((vocab, lora.rank))}
        if value_head:
            self.weights["value"] = np.zeros(vocab)
        self.first = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.steps = 0

    def table(self) -> Float64Array:
        """Return the logits [V, V] that the weights stand for; never a view of them."""
        if "table" in self.weights:
            return self.weights["table"].copy()
        result: Float64Array = self.base + self.factor * (self.weights["lora_b"] @ self.weights["lora_a"])
        return result

    def values(self) -> Float64Array | None:
        """Return a copy of the value of each token [V]; None without a value head."""
        return self.weights["value"].copy() if "value" in self.weights else None

    def gradients(self, gradient: Float64Array) -> dict[str, Float64Array]:
        """Return the gradient of each trained weight from that of table and values, [V, V + 1]."""
        d_table = gradient[:, :-1]
        found = {"value": gradient[:, -1]} if "value" in self.weights else {}
        if "table" in self.weights:
            return {"table": d_table, **found}
        a, b = self.weights["lora_a"], self.weights["lora_b"]
        return {"lora_a": self.factor * (b.T @ d_table), "lora_b": self.factor * (d_table @ a.T), **found}

    def apply(self, gradients: dict[str, Float64Array], params: AdamParams) -> None:
        """Make one AdamW step (Loshchilov & Hutter 2019, algorithm 2)."""
        self.steps += 1
        for name, gradient in gradients.items():
            m = self.first[name] = params.beta1 * self.first[name] + (1 - params.beta1) * gradient
            v = self.second[name] = params.beta2 * self.second[name] + (1 - params.beta2) * gradient**2
            m_hat, v_hat = m / (1 - params.beta1**self.steps), v / (1 - params.beta2**self.steps)
            decayed = self.weights[name] * (1 - params.learning_rate * params.weight_decay)
            self.weights[name] = decayed - params.learning_rate * m_hat / (np.sqrt(v_hat) + params.eps)

    def arrays(self) -> dict[str, Array]:
        """Return all that a training state holds."""
        groups = {"w": self.weights, "m": self.first, "v": self.second}
        named = {f"{group}.{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
        return {"base": self.base, **named}

    def restore(self, arrays: dict[str, Any], steps: int) -> None:
        """Take over arrays of :meth:`arrays`, which must have the same names and shapes."""
        self.base, self.steps = arrays["base"], steps
        for name in self.weights:
            self.weights[name] = arrays[f"w.{name}"]
            self.first[name] = arrays[f"m.{name}"]
            self.second[name] = arrays[f"v.{name}"]

    def fits(self, arrays: dict[str, Any]) -> bool:
        """Return whether arrays are of this kind of model."""
        own = self.arrays()
        return own.keys() == arrays.keys() and all(own[name].shape == arrays[name].shape for name in own)
