"""Preference losses on per-token log-probabilities: DPO and its family, SimPO, ORPO, KTO. Float64 throughout.

Every loss is a frozen value that fulfils ``crucible_kitchen.types.Loss``. Losses of pairs are called with two datums,
chosen first; :class:`KTO` with one. Loss inputs, each [T]:

- ``weights``: 1 on the tokens of the answer, 0 on the prompt (other inputs may be anything there).
- ``reference_logprobs``: log-probabilities under the frozen reference, nats; not read by SimPO and ORPO.
- ``desirable`` (KTO): 1 on every position of a wanted answer, 0 of an unwanted one.

With the sum over an answer's tokens, ``c = sum(logprobs - reference)`` of the chosen answer and ``r`` of the rejected
one, nats; ``|y|`` is the number of an answer's tokens. Totals are sums over pairs: nothing is averaged, a batch of N
pairs is scaled by 1 / N at the step. Metrics are sums: ``pairs`` counts, ``accuracy`` counts pairs whose chosen reward
is strictly larger (0 where policy and reference are equal), ``margin``, ``chosen_reward`` and ``rejected_reward`` are
sums of implicit rewards, ``beta * c`` and ``beta * r`` unless said otherwise. Losses and gradients are finite at
margins of 1e4 nats. Knows no dataset. Read next: ``crucible_kitchen.learner.reward``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from crucible_kitchen.learner.numerics import log1mexp, log_sigmoid, loss_input, sigmoid, spread, trained
from crucible_kitchen.types import Array, Float64Array, LossValue

__all__ = ["DPO", "IPO", "KTO", "ORPO", "APOZero", "Hinge", "RobustDPO", "SimPO", "kto_reference_point"]


class _Answer(NamedTuple):
    """One answer: its tokens' places, their number, its score, and the score's derivative by a log-probability."""

    places: Array
    length: int
    score: float

    @classmethod
    def of(cls, loss: str, logprobs: Array, inputs: Mapping[str, Array], *, reference: bool, mean: bool) -> "_Answer":
        now = np.asarray(logprobs, dtype=np.float64)
        places, _ = trained(loss, inputs, len(now))
        if not len(places):
            raise ValueError(f"the loss {loss!r} was given an answer without tokens")
        found = now[places]
        if reference:
            found = found - loss_input(loss, inputs, "reference_logprobs", len(now))[places]
        return cls(places, len(places), float(found.mean() if mean else found.sum()))

    def spread(self, slope: float, length: int, *, mean: bool) -> Float64Array:
        """Return a derivative by the score as one by each log-probability."""
        return spread(slope / self.length if mean else slope, self.places, (length,))


class _Point(NamedTuple):
    """A loss at two scores, and its derivatives by them."""

    loss: float
    by_chosen: float
    by_rejected: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """What losses of pairs share.

    Attributes:
        beta: above 0; how much a nat of difference from the reference is worth.
    """

    beta: float = 0.1

    name: ClassVar[str] = ""
    group: ClassVar[int] = 2
    reference: ClassVar[bool] = True  # scores are differences from the reference
    mean: ClassVar[bool] = False  # scores are means over tokens

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, is {self.beta}")

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one pair, the chosen answer first.

        Raises:
            ValueError: an input is missing or of another length, or an answer has no tokens.
        """
        chosen, rejected = (
            _Answer.of(self.name, x, inputs, reference=self.reference, mean=self.mean)
            for x, inputs in zip(logprobs, loss_inputs, strict=True)
        )
        point = self._point(chosen.score, rejected.score)
        good, bad = (self._reward(answer) for answer in (chosen, rejected))
        metrics = {
            "pairs": 1.0,
            "accuracy": float(good > bad),
            "margin": good - bad,
            "chosen_reward": good,
            "rejected_reward": bad,
        }
        d_chosen = chosen.spread(point.by_chosen, len(logprobs[0]), mean=self.mean)
        d_rejected = rejected.spread(point.by_rejected, len(logprobs[1]), mean=self.mean)
        return LossValue(point.loss, [d_chosen, d_rejected], metrics)

    def _point(self, chosen: float, rejected: float) -> _Point:
        raise NotImplementedError

    def _reward(self, answer: _Answer) -> float:
        return self.beta * answer.score


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO(_Pair):
    """``-(1 - e) log sigmoid(h) - e log sigmoid(-h)`` with ``h = beta (c - r)`` (Rafailov et al. 2023, eq. 7).

    With label smoothing ``e`` (Mitchell 2023, "cDPO"; OpenRLHF) the margin is pulled to ``log((1 - e) / e)``. TRL's
    ``sigmoid`` has no smoothing since 1.0; see :class:`RobustDPO`. The loss is ln 2 where policy and reference are
    equal.

    Attributes:
        label_smoothing: e, from 0 to below 0.5: the share of pairs thought to be the wrong way round.
    """

    label_smoothing: float = 0.0

    name: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        _Pair.__post_init__(self)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be from 0 to below 0.5, is {self.label_smoothing}")

    def _point(self, chosen: float, rejected: float) -> _Point:
        h, e = self.beta * (chosen - rejected), self.label_smoothing
        loss = -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)
        slope = self.beta * (e * sigmoid(h) - (1 - e) * sigmoid(-h))
        return _Point(loss, slope, -slope)


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustDPO(DPO):
    """``((1 - e) L(h) - e L(-h)) / (1 - 2 e)``, L the loss of DPO (Chowdhury et al. 2024; TRL ``robust``).

    Unbiased for the clean loss when a share ``e`` of the pairs is the wrong way round; may be negative.
    """

    label_smoothing: float = 0.1

    name: ClassVar[str] = "robust"

    def _point(self, chosen: float, rejected: float) -> _Point:
        h, e = self.beta * (chosen - rejected), self.label_smoothing
        loss = (-(1 - e) * log_sigmoid(h) + e * log_sigmoid(-h)) / (1 - 2 * e)
        slope = -self.beta * ((1 - e) * sigmoid(-h) + e * sigmoid(h)) / (1 - 2 * e)
        return _Point(loss, slope, -slope)


@dataclass(frozen=True, slots=True, kw_only=True)
class IPO(_Pair):
    """``(c / |y_c| - r / |y_r| - 1 / (2 beta))^2`` (Azar et al. 2023, eq. 17), averaged over each answer's length.

    The average is what the authors confirmed and TRL does; OpenRLHF and TRL's CPO take sums. Rewards reported are
    ``beta`` times sums, as TRL's.
    """

    name: ClassVar[str] = "ipo"
    mean: ClassVar[bool] = True

    def _point(self, chosen: float, rejected: float) -> _Point:
        off = chosen - rejected - 1 / (2 * self.beta)
        return _Point(off * off, 2 * off, -2 * off)

    def _reward(self, answer: _Answer) -> float:
        return self.beta * answer.score * answer.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Hinge(_Pair):
    """``max(0, 1 - beta (c - r))`` (Zhao et al. 2023, SLiC; TRL ``hinge``)."""

    name: ClassVar[str] = "hinge"

    def _point(self, chosen: float, rejected: float) -> _Point:
        missing = 1 - self.beta * (chosen - rejected)
        slope = -self.beta if missing > 0 else 0.0
        return _Point(max(0.0, missing), slope, -slope)


@dataclass(frozen=True, slots=True, kw_only=True)
class APOZero(_Pair):
    """``1 - sigmoid(beta c) + sigmoid(beta r)`` (D'Oosterlinck et al. 2024, eq. 7; TRL ``apo_zero``).

    For chosen answers that are better than the model's own. The loss is 1 where policy and reference are equal.
    """

    name: ClassVar[str] = "apo_zero"

    def _point(self, chosen: float, rejected: float) -> _Point:
        c, r = self.beta * chosen, self.beta * rejected
        slopes = [self.beta * sigmoid(x) * sigmoid(-x) for x in (c, r)]
        return _Point(sigmoid(-c) + sigmoid(r), -slopes[0], slopes[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class SimPO(_Pair):
    """``-log sigmoid(beta (a_c - a_r) - gamma)``, ``a`` the mean log-probability of an answer.

    Meng et al. 2024, eq. 6. No reference. TRL has it in its CPO trainer, with the same numbers; rewards are ``beta a``.

    Attributes:
        gamma: the margin asked for, in units of the reward; the paper's gamma, TRL's ``simpo_gamma``.
    """

    beta: float = 2.0
    gamma: float = 0.5

    name: ClassVar[str] = "simpo"
    reference: ClassVar[bool] = False
    mean: ClassVar[bool] = True

    def _point(self, chosen: float, rejected: float) -> _Point:
        h = self.beta * (chosen - rejected) - self.gamma
        slope = -self.beta * sigmoid(-h)
        return _Point(-log_sigmoid(h), slope, -slope)


@dataclass(frozen=True, slots=True, kw_only=True)
class ORPO(_Pair):
    """``-a_c - beta log sigmoid(log odds(a_c) - log odds(a_r))``, ``log odds(a) = a - log(1 - exp(a))``.

    Hong et al. 2024, eq. 6 and 7; ``a`` is the mean log-probability of an answer, no reference. Rewards are ``beta a``.
    Known divergence: TRL takes the first term, the negative log-likelihood, over prompt and answer and averages it over
    all tokens of the batch; here it is the answer's, averaged by answer. ``nll`` below sets its weight; with 0 the
    odds-ratio term alone remains, which equals TRL's.

    Attributes:
        nll: weight of the first term.
    """

    nll: float = 1.0

    name: ClassVar[str] = "orpo"
    reference: ClassVar[bool] = False
    mean: ClassVar[bool] = True

    def _point(self, chosen: float, rejected: float) -> _Point:
        c, r = min(chosen, -1e-12), min(rejected, -1e-12)  # the odds of a certain answer are infinite
        odds = c - r - float(log1mexp(c)) + float(log1mexp(r))
        slope = -self.beta * sigmoid(-odds)
        by_chosen, by_rejected = -slope / math.expm1(c), slope / math.expm1(r)
        return _Point(-self.nll * chosen - self.beta * log_sigmoid(odds), by_chosen - self.nll, by_rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class KTO:
    """``w_d (1 - sigmoid(beta (s - z)))`` of a wanted answer, ``w_u (1 - sigmoid(beta (z - s)))`` of an unwanted one.

    Ethayarajh et al. 2024, eq. 7; ``s = sum(logprobs - reference)``. Rows are not paired. The reference point
    ``z`` belongs to the batch and takes no gradient: compute it with :func:`kto_reference_point` and make the batch's
    loss with ``dataclasses.replace(loss, reference_point=z)``. Metrics: ``rows``, ``desirable``, ``accuracy`` (rows on
    the right side of z), and sums of rewards by kind, ``chosen_reward`` and ``rejected_reward``; the margin is the
    difference of their means.

    Attributes:
        beta: above 0.
        desirable_weight: w_d; the paper keeps ``w_d n_d / (w_u n_u)`` from 1 to 4/3.
        undesirable_weight: w_u.
        reference_point: z, nats, 0 or more.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_point: float = 0.0

    name: ClassVar[str] = "kto"
    group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, is {self.beta}")

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one answer.

        Raises:
            ValueError: an input is missing or of another length, or the answer has no tokens.
        """
        (now,), (inputs,) = logprobs, loss_inputs
        answer = _Answer.of(self.name, now, inputs, reference=True, mean=False)
        wanted = bool(loss_input(self.name, inputs, "desirable", len(now))[answer.places[0]])
        sign, weight = (1, self.desirable_weight) if wanted else (-1, self.undesirable_weight)
        h = sign * self.beta * (answer.score - self.reference_point)
        slope = -sign * weight * self.beta * sigmoid(h) * sigmoid(-h)
        reward = self.beta * answer.score
        metrics = {
            "rows": 1.0,
            "desirable": float(wanted),
            "accuracy": float(h > 0),
            "chosen_reward": reward if wanted else 0.0,
            "rejected_reward": 0.0 if wanted else reward,
        }
        return LossValue(weight * sigmoid(-h), [answer.spread(slope, len(now), mean=False)], metrics)


def kto_reference_point(log_ratios: ArrayLike) -> float:
    """Return KTO's z: the mean of ``sum(logprobs - reference)`` over mismatched answers, 0 at least.

    Ethayarajh et al. 2024, section 4.1. TRL's default pairs each prompt with the next row's answer.

    Args:
        log_ratios: nats, one number per prompt of the batch, of an answer that belongs to another prompt.
    """
    x = np.asarray(log_ratios, dtype=np.float64)
    return max(0.0, float(x.mean())) if x.size else 0.0
