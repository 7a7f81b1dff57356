"""Policy-gradient losses on per-token log-probabilities, and the value loss. Float64 throughout.

Every loss is a frozen value that fulfils ``crucible_kitchen.types.Loss``: called with one datum's log-probabilities and
loss inputs it returns the *sum* over positions of ``weights_t * loss_t``, and the derivative. Inputs, each [T]:

- ``weights``: 0 where nothing is trained (prompts, tool output; other inputs may be anything there), else what the
  position counts for: ``token_weights`` gives the aggregations of the field.
- ``advantages``: A_t.
- ``logprobs``: log-probabilities of the tokens, nats, under the policy that the ratio refers to.
- ``reference_logprobs`` with ``kl_coef``, ``proximal_logprobs`` for :class:`DecoupledPPO`.

``rho_t = exp(clip(logprobs_now - logprobs, -20, 20))``; beyond the limit the gradient is zero (verl, OpenRLHF and SkyRL
have it too, TRL and Tinker do not). Metrics are sums over trained positions, counted by ``tokens``: the mean over any
number of calls is a sum divided by a sum. Knows no model. Read next: ``crucible_kitchen.learner.estimators``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crucible_kitchen.learner.estimators import LOG_RATIO_LIMIT, Truncation, k2, k3, truncated_importance_weights
from crucible_kitchen.learner.numerics import loss_input, spread, trained
from crucible_kitchen.types import Array, Float64Array, LossValue

__all__ = ["CISPO", "GSPO", "PPO", "DecoupledPPO", "ImportanceSampling", "ValueLoss"]


class _Tokens(NamedTuple):
    """The trained positions of one datum, [n] each."""

    weights: Float64Array
    now: Float64Array
    old: Float64Array  # what the ratio refers to
    sampled: Float64Array  # the policy that sampled; the same, but for stale data
    advantages: Float64Array

    def ratio(self) -> "_Ratio":
        return _Ratio.of(self.now - self.old)


class _Ratio(NamedTuple):
    """A probability ratio, its logarithm after the cut, and its derivative by the log-probability."""

    value: Float64Array
    log: Float64Array
    slope: Float64Array

    @classmethod
    def of(cls, log_ratio: Float64Array) -> "_Ratio":
        log = np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        value = np.exp(log)
        return cls(value, log, np.where(log == log_ratio, value, 0.0))


class _Surrogate(NamedTuple):
    """A loss's sum over positions, its derivative [n], and its own metrics."""

    total: float
    slopes: Float64Array
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PolicyLoss:
    """What all policy losses share: trained positions, the KL term, the entropy term, metrics.

    Attributes:
        kl_coef: c_kl; adds ``c_kl * k(now, reference)`` per token.
        kl_estimator: ``k2`` has the gradient of the reverse KL on samples of the policy; ``k3`` (TRL's, DeepSeek's)
            has the forward KL's. ``k1`` has none, and belongs in the reward.
        entropy_coef: c_H; adds ``c_H * logprob^2 / 2`` per token, whose gradient on samples of the policy is that of
            ``-c_H * entropy`` (the plain estimate ``-logprob`` has a gradient of zero in expectation).
    """

    kl_coef: float = 0.0
    kl_estimator: Literal["k2", "k3"] = "k2"
    entropy_coef: float = 0.0

    name: ClassVar[str] = ""
    group: ClassVar[int] = 1
    centre: ClassVar[str] = "logprobs"

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one datum.

        Raises:
            ValueError: an input is missing or of another length.
        """
        now, inputs = np.asarray(logprobs[0], dtype=np.float64), loss_inputs[0]
        chosen, weights = trained(self.name, inputs, len(now))

        def read(name: str) -> Float64Array:
            return loss_input(self.name, inputs, name, len(now))[chosen]

        tokens = _Tokens(weights, now[chosen], read(self.centre), read("logprobs"), read("advantages"))
        found = self._surrogate(tokens)
        total, slopes, metrics = found.total, found.slopes, {**_metrics(tokens), **found.metrics}
        if self.kl_coef:
            value, slope = _penalty(tokens.now, read("reference_logprobs"), self.kl_estimator)
            total += self.kl_coef * float(tokens.weights @ value)
            slopes = slopes + self.kl_coef * tokens.weights * slope
            metrics["kl"] = float(k3(tokens.now, read("reference_logprobs")).sum())
        if self.entropy_coef:
            total += self.entropy_coef * float(tokens.weights @ np.square(tokens.now)) / 2
            slopes = slopes + self.entropy_coef * tokens.weights * tokens.now
        return LossValue(total, [spread(slopes, chosen, now.shape)], {**metrics, "policy_loss": found.total})

    def _surrogate(self, tokens: _Tokens) -> _Surrogate:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceSampling(_PolicyLoss):
    """``-rho_t * A_t``: the policy gradient, corrected for the policy that sampled; nothing is clipped.

    The Tinker service's ``importance_sampling``. At a ratio of 1 its gradient is REINFORCE's, ``-A_t``.
    """

    name: ClassVar[str] = "importance_sampling"

    def _surrogate(self, tokens: _Tokens) -> _Surrogate:
        ratio = tokens.ratio()
        scaled = tokens.weights * tokens.advantages
        return _Surrogate(-float(scaled @ ratio.value), -scaled * ratio.slope, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class PPO(_PolicyLoss):
    """``max(-rho A, -clip(rho, 1 - low, 1 + high) A)`` (Schulman et al. 2017, eq. 7), with dual clip if asked for.

    With ``dual_clip`` c, losses of negative advantages are at most ``-c A`` (Ye et al. 2020; verl has it
    always on, with 3; TRL's ``delta`` is the same above ``1 + high``). DAPO's clip-higher is low 0.2, high 0.28
    (Yu et al. 2025, eq. 10). The metric ``clipped`` counts positions without a gradient for being clipped, as TRL's
    and verl's; CleanRL and SB3 count ``|rho - 1| > eps`` whatever the advantage's sign. The Tinker service takes
    absolute thresholds ``1 - low`` and ``1 + high``.

    Attributes:
        clip_low: 0 or more.
        clip_high: 0 or more.
        dual_clip: above 1, or None.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    name: ClassVar[str] = "ppo"

    def __post_init__(self) -> None:
        if min(self.clip_low, self.clip_high) < 0:
            raise ValueError("clip_low and clip_high are distances from 1 and cannot be negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError("dual_clip is a ratio and must be above 1")

    def _surrogate(self, tokens: _Tokens) -> _Surrogate:
        ratio = tokens.ratio()
        losses, slopes, clipped = self._clip(ratio, tokens.advantages)
        total = float(tokens.weights @ losses)
        return _Surrogate(total, tokens.weights * slopes, {"clipped": float(clipped.sum())})

    def _clip(self, ratio: _Ratio, a: Float64Array) -> tuple[Float64Array, Float64Array, NDArray[np.bool_]]:
        """Return losses, their derivatives by the log-probability, and which are clipped."""
        free = -ratio.value * a
        bound = -np.clip(ratio.value, 1 - self.clip_low, 1 + self.clip_high) * a
        losses, clipped = np.maximum(free, bound), bound > free
        if self.dual_clip is not None:
            most = -self.dual_clip * a
            above = (a < 0) & (losses > most)
            losses, clipped = np.where(above, most, losses), clipped | above
        return losses, np.where(clipped, 0.0, -ratio.slope * a), clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoupledPPO(PPO):
    """PPO for stale data: the clip is centred on a recent policy, a weight corrects for the one that sampled.

    ``w_t * ppo(exp(now - proximal))`` with ``w_t = exp(proximal - logprobs)``, constant (Hilton et al. 2022;
    Fu et al. 2025, AReaL, eq. 5). ``proximal_logprobs`` are computed by the trainer when a batch begins. Weights above
    ``cap`` drop the position (``mask``, as AReaL) or become the cap (``truncate``). Dropped positions stay in the
    normaliser, as in AReaL. With equal proximal and sampling policies this is PPO.

    Attributes:
        cap: above 0.
        excess: what happens above it.
    """

    cap: float = 5.0
    excess: Literal["mask", "truncate"] = "mask"

    name: ClassVar[str] = "decoupled_ppo"
    centre: ClassVar[str] = "proximal_logprobs"

    def _surrogate(self, tokens: _Tokens) -> _Surrogate:
        mode: Truncation = "token_mask" if self.excess == "mask" else "token_truncate"
        w = truncated_importance_weights(tokens.old, tokens.sampled, cap=self.cap, mode=mode)
        corrected = tokens._replace(weights=tokens.weights * w)
        found = PPO._surrogate(self, corrected)
        return found._replace(metrics={**found.metrics, "behaviour_weight": float(w.sum())})


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPO(_PolicyLoss):
    """``-sg(clip(rho, min, max)) * A_t * logprob_t`` (MiniMax-M1, 2025, eq. 4): clipped weights, every token trains.

    The bounds are absolute: 0 and 4 are the Tinker service's. TRL's ``epsilon_high`` is this ``ratio_max`` without a
    lower bound; verl's and slime's are ``1 - eps_low`` and ``1 + eps_high``. ``clipped`` counts ratios outside.
    """

    ratio_min: float = 0.0
    ratio_max: float = 4.0

    name: ClassVar[str] = "cispo"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio_min <= self.ratio_max:
            raise ValueError("ratio_min must be from 0 to ratio_max")

    def _surrogate(self, tokens: _Tokens) -> _Surrogate:
        ratio = tokens.ratio().value
        weight = np.clip(ratio, self.ratio_min, self.ratio_max)
        slopes = -tokens.weights * weight * tokens.advantages
        return _Surrogate(float(slopes @ tokens.now), slopes, {"clipped": float((weight != ratio).sum())})


@dataclass(frozen=True, slots=True, kw_only=True)
class GSPO(PPO):
    """PPO with one ratio per sequence, ``s = exp(mean_t(now - logprobs))`` over trained positions.

    Zheng et al. 2025, eq. 5 to 7, whose clips are these defaults. Aggregate by ``sequence_mean``. The gradient is that
    of TRL's (B, 1) ratio. verl and OpenRLHF write ``sg(s) * pi / sg(pi)``, which gives each token its own weight: equal
    for one advantage per sequence under ``sequence_mean``, else not. ``clipped`` counts positions.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    name: ClassVar[str] = "gspo"

    def _surrogate(self, tokens: _Tokens) -> _Surrogate:
        n = len(tokens.now)
        if not n:
            return _Surrogate(0.0, tokens.now, {"clipped": 0.0})
        ratio = _Ratio.of(np.full(n, float((tokens.now - tokens.old).mean())))
        losses, slopes, clipped = self._clip(ratio, tokens.advantages)
        share = float(tokens.weights @ slopes) / n
        return _Surrogate(float(tokens.weights @ losses), np.full(n, share), {"clipped": float(clipped.sum())})


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """``(V - R)^2 / 2``, or with ``clip`` the larger of that and the same for V kept near its old value.

    ``max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2``, summed with weights (CleanRL, verl, OpenRLHF;
    SB3 has neither clip nor factor by default). Called like a policy loss, with values in place of log-probabilities;
    inputs ``returns``, ``weights``, and ``values`` (the old ones) with ``clip``. The derivative is by the values.

    Attributes:
        clip: eps, in units of the values; None does not clip.
    """

    clip: float | None = None

    name: ClassVar[str] = "value"
    group: ClassVar[int] = 1

    def __call__(self, values: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one datum.

        Raises:
            ValueError: an input is missing or of another length.
        """
        now, inputs = np.asarray(values[0], dtype=np.float64), loss_inputs[0]
        chosen, w = trained(self.name, inputs, len(now))
        v = now[chosen]
        error = v - loss_input(self.name, inputs, "returns", len(now))[chosen]
        squares, slopes = np.square(error), w * error
        metrics = {"value_tokens": float(len(chosen))}
        if self.clip is not None:
            old = loss_input(self.name, inputs, "values", len(now))[chosen]
            kept = np.square(old + np.clip(v - old, -self.clip, self.clip) - v + error)
            clipped = kept > squares
            squares, slopes = np.maximum(squares, kept), np.where(clipped, 0.0, slopes)
            metrics["value_clipped"] = float(clipped.sum())
        total = float(w @ squares) / 2
        return LossValue(total, [spread(slopes, chosen, now.shape)], {**metrics, "value_loss": total})


def _penalty(now: Float64Array, reference: Float64Array, estimator: str) -> tuple[Float64Array, Float64Array]:
    """Return a KL estimator per token and its derivative by the log-probability."""
    if estimator == "k2":
        return k2(now, reference), now - reference
    back = _Ratio.of(reference - now)
    return k3(now, reference), np.where(back.slope > 0, -np.expm1(back.log), 0.0)


def _metrics(tokens: _Tokens) -> dict[str, float]:
    """Return what is reported of every policy loss; ``approx_kl`` is k3 of the old policy against this one."""
    if not len(tokens.now):
        return {"tokens": 0.0}
    ratio = tokens.ratio()
    return {
        "tokens": float(len(tokens.now)),
        "ratio": float(ratio.value.sum()),
        "ratio:max": float(ratio.value.max()),
        "approx_kl": float((np.expm1(ratio.log) - ratio.log).sum()),
        "entropy": -float(tokens.now.sum()),
    }
