"""Advantages from a group of rewards for one problem, and how advantages are normalised. Float64 throughout.

Knows numbers only, no rollouts and no values. Read next: ``crucible_kitchen.learner.policy``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from crucible_kitchen.types import Float64Array

__all__ = [
    "STD_CONVENTIONS",
    "Moments",
    "Normalization",
    "StdConvention",
    "centred",
    "dr_grpo",
    "grpo",
    "maxrl",
    "normalize",
    "rloo",
    "whiten",
]

StdConvention: TypeAlias = Literal["trl", "verl", "openrlhf", "open_instruct", "rllm"]
Normalization: TypeAlias = Literal["none", "group", "batch", "running"]


class StdRule(NamedTuple):
    """How a standard deviation divides: ``x / (std + eps)``, ``ddof`` 1 for the unbiased variance."""

    ddof: int
    eps: float


STD_CONVENTIONS: dict[StdConvention, StdRule] = {
    "trl": StdRule(1, 1e-4),  # and torchforge
    "verl": StdRule(1, 1e-6),  # and SkyRL, slime, ROLL
    "openrlhf": StdRule(1, 1e-9),
    "open_instruct": StdRule(0, 1e-8),
    "rllm": StdRule(0, 1e-6),  # and ART
}
"""What each implementation divides a group's rewards by; ddof 0 gives ``sqrt(G / (G - 1))`` more than ddof 1."""


def grpo(rewards: ArrayLike, *, std: StdConvention = "trl") -> Float64Array:
    """Centre each group's rewards and divide by their standard deviation (Shao et al. 2024, section 4.1.2).

    ``A_i = (r_i - mean(r)) / (std(r) + eps)``; ``std`` names the implementation whose ddof and eps are meant
    (``STD_CONVENTIONS``). Problems that are nearly always or nearly never solved weigh more than under
    :func:`centred` (Liu et al. 2025, "Understanding R1-Zero-Like Training").

    A group of equal rewards gives exactly 0; in float32 the others' means are off by one unit in the last place, which
    their eps turns into advantages of up to 60. For a group of one verl gives ``A = r`` and TRL 0; here it is refused.

    Args:
        rewards: [..., G], one group along the last axis; give groups of unlike sizes one by one.
        std: the convention.

    Raises:
        ValueError: G is below 2, a reward is not finite, or the convention is unknown.
    """
    if std not in STD_CONVENTIONS:
        raise ValueError(f"no convention {std!r}; there are {', '.join(STD_CONVENTIONS)}")
    rule = STD_CONVENTIONS[std]
    r = _groups(rewards)
    return _exact(r, (r - _mean(r)) / (r.std(axis=-1, ddof=rule.ddof, keepdims=True) + rule.eps))


def centred(rewards: ArrayLike) -> Float64Array:
    """Centre each group's rewards: ``A_i = r_i - mean(r)`` (Tinker cookbook, prime-rl).

    The mean includes the sample itself, so the gradient is ``(G - 1) / G`` of :func:`rloo`'s. Shapes and errors are
    those of :func:`grpo`; equal rewards give exactly 0.
    """
    r = _groups(rewards)
    return _exact(r, r - _mean(r))


def dr_grpo(rewards: ArrayLike) -> Float64Array:
    """Centre each group's rewards, without a standard deviation (Dr. GRPO, Liu et al. 2025).

    The same numbers as :func:`centred`. The method is this and the aggregation ``dr_grpo``
    (``crucible_kitchen.learner.policy.token_weights``), which divides by a constant length and not by each sequence's.
    """
    return centred(rewards)


def rloo(rewards: ArrayLike) -> Float64Array:
    """Subtract from each reward the mean of the others: ``A_i = r_i - sum_{j != i} r_j / (G - 1)``.

    Kool et al. 2019; Ahmadian et al. 2024. Equals ``G / (G - 1)`` times :func:`centred`, an unbiased
    baseline. Shapes and errors are those of :func:`grpo`; equal rewards give exactly 0. TRL's is the same where every
    reward is scorable.
    """
    r = _groups(rewards)
    size = r.shape[-1]
    return _exact(r, (r - _mean(r)) * (size / (size - 1)))


def maxrl(rewards: ArrayLike) -> Float64Array:
    """Centre each group's rewards and divide by their mean: ``A_i = (r_i - mean(r)) / mean(r)`` (MaxRL).

    With rewards of 0 and 1 its expectation is a truncated maximum-likelihood gradient: problems that are rarely
    solved weigh more. A group of zeros gives 0. Implementations add an eps to the divisor; none is added here.

    Raises:
        ValueError: as :func:`grpo`, or a reward is negative.
    """
    r = _groups(rewards)
    if (r < 0).any():
        raise ValueError("maxrl divides by the mean reward and needs rewards of 0 or more")
    mean = _mean(r)
    return _exact(r, (r - mean) / np.where(mean > 0, mean, 1.0))


def whiten(x: ArrayLike, mask: ArrayLike | None = None, *, form: Literal["verl", "cleanrl"] = "verl") -> Float64Array:
    """Shift to mean 0 and scale to variance 1 over the positions of a mask, all axes together.

    ``verl``: ``(x - mean) / sqrt(var + 1e-8)`` (also OpenRLHF, SkyRL); ``cleanrl``: ``(x - mean) / (std + 1e-8)``;
    the variance is unbiased in both. Equal values give exactly 0. Fewer than two positions give 0, where verl raises.

    Args:
        x: any shape.
        mask: bool, the same shape, which positions count; the others become 0. None: all.
        form: where the epsilon stands.

    Raises:
        ValueError: shapes differ, or a value that counts is not finite.
    """
    values = np.asarray(x, dtype=np.float64)
    chosen = np.ones(values.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if chosen.shape != values.shape:
        raise ValueError(f"the mask has shape {chosen.shape}, the values {values.shape}")
    moments = Moments().update(values[chosen])
    return np.where(chosen, moments.standardize(values, form), 0.0)


@dataclass(frozen=True, slots=True)
class Moments:
    """Running mean and variance of what was seen, as three numbers that a checkpoint can hold.

    Attributes:
        count: how many values.
        mean: of them.
        m2: the sum of their squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: ArrayLike) -> "Moments":
        """Return the moments with more values in them (Chan et al. 1979).

        Raises:
            ValueError: a value is not finite.
        """
        x = np.asarray(values, dtype=np.float64).reshape(-1)
        if not len(x):
            return self
        if not np.isfinite(x).all():
            raise ValueError("an advantage or reward is not finite")
        mean = float(x[0]) if x.min() == x.max() else float(x.mean())
        count, shift = self.count + len(x), mean - self.mean
        m2 = self.m2 + float(np.square(x - mean).sum()) + shift * shift * self.count * len(x) / count
        return Moments(count, self.mean + shift * len(x) / count, m2)

    @property
    def variance(self) -> float:
        """The unbiased variance; 0 for fewer than two values."""
        return self.m2 / (self.count - 1) if self.count > 1 else 0.0

    def standardize(self, x: Float64Array, form: Literal["verl", "cleanrl"] = "verl") -> Float64Array:
        """Return ``x`` shifted and scaled by these moments, see :func:`whiten`; 0 if they have no variance."""
        if not self.variance:
            return np.zeros_like(x)
        by = math.sqrt(self.variance + 1e-8) if form == "verl" else math.sqrt(self.variance) + 1e-8
        return (x - self.mean) / by


def normalize(
    advantages: Sequence[ArrayLike],
    how: Normalization,
    *,
    masks: Sequence[ArrayLike] | None = None,
    moments: Moments | None = None,
) -> tuple[list[Float64Array], Moments]:
    """Normalise advantages by mean and variance: of nothing, of each group, of the batch, or of all seen so far.

    ``none`` copies. ``group`` and ``batch`` whiten over a group, or over all groups together (REINFORCE++, Hu 2025,
    when the advantages were centred by group). ``running`` adds each group to the moments in the order given
    and then uses them: its result for a group depends on earlier groups only, so groups may be trained as they arrive.
    Each position of a mask counts once: with one advantage per sequence, spread over tokens, long sequences weigh more.

    Args:
        advantages: one array of any shape per group.
        how: see above.
        masks: bool, shaped as the advantages: which positions count, the others become 0. None: all.
        moments: of what was seen before; ``running`` only.

    Returns:
        The normalised groups, float64, and the moments to go on with (those given, unless ``running``).

    Raises:
        ValueError: shapes differ, or a value that counts is not finite.
    """
    groups = [np.asarray(a, dtype=np.float64) for a in advantages]
    chosen = [np.ones(g.shape, dtype=bool) for g in groups] if masks is None else [np.asarray(m, bool) for m in masks]
    if [g.shape for g in groups] != [c.shape for c in chosen]:
        raise ValueError("advantages and masks differ in shape")
    seen = moments or Moments()
    if how == "none":
        return [np.where(c, g, 0.0) for g, c in zip(groups, chosen, strict=True)], seen
    if how == "group":
        return [whiten(g, c) for g, c in zip(groups, chosen, strict=True)], seen
    if how == "batch":
        used = Moments().update(np.concatenate([g[c] for g, c in zip(groups, chosen, strict=True)] or [np.zeros(0)]))
        return [np.where(c, used.standardize(g), 0.0) for g, c in zip(groups, chosen, strict=True)], seen
    found = []
    for g, c in zip(groups, chosen, strict=True):
        seen = seen.update(g[c])
        found.append(np.where(c, seen.standardize(g), 0.0))
    return found, seen


def _groups(rewards: ArrayLike) -> Float64Array:
    r = np.asarray(rewards, dtype=np.float64)
    if not r.ndim or r.shape[-1] < 2:
        raise ValueError(f"a group-relative advantage needs groups of two or more, the rewards have shape {r.shape}")
    if not np.isfinite(r).all():
        raise ValueError("a reward is not finite: only scored rollouts belong to a group")
    return r


def _mean(r: Float64Array) -> Any:
    return r.mean(axis=-1, keepdims=True)


def _exact(r: Float64Array, advantages: Float64Array) -> Float64Array:
    """Return the advantages, exactly 0 where a group's rewards are equal."""
    equal = r.max(axis=-1, keepdims=True) == r.min(axis=-1, keepdims=True)
    return np.where(equal, 0.0, advantages)
