"""What surrounds a policy loss: aggregation weights, importance weights, KL, entropy and explained variance. Float64.

Knows no loss. Read next: ``crucible_kitchen.learner.policy``.
"""

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from crucible_kitchen.types import Float64Array

__all__ = [
    "LOG_RATIO_LIMIT",
    "Aggregation",
    "TokenWeights",
    "Truncation",
    "entropy_estimate",
    "explained_variance",
    "k1",
    "k2",
    "k3",
    "token_weights",
    "truncated_importance_weights",
]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are cut to plus or minus this many nats; e^20 is 5e8."""

Aggregation: TypeAlias = Literal["token_mean", "sequence_mean", "dr_grpo", "sequence_sum"]
Truncation: TypeAlias = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class TokenWeights(NamedTuple):
    """Weights of one datum [T], and what it adds to the number that the optimizer step divides by."""

    weights: Float64Array
    divisor: float


def token_weights(mask: ArrayLike, aggregation: Aggregation, *, max_length: int = 0) -> TokenWeights:
    """Return the weights of one sequence's tokens under an aggregation of the field.

    The loss of a batch is the weighted sum over all of it, divided once, at the optimizer step, by the sum of
    ``divisor``: it cannot depend on micro-batches (as TRL's ``bnpo`` does, which is ``token_mean`` here).

    ================= ============== =========== =====================================================================
    aggregation       weight         divisor     whose
    ================= ============== =========== =====================================================================
    ``token_mean``    1              tokens      DAPO (Yu et al. 2025, eq. 12); TRL ``dapo``
    ``sequence_mean`` 1 / tokens     1           GRPO (Shao et al. 2024, eq. 3), GSPO; TRL ``grpo``
    ``dr_grpo``       1 / max_length 1           Dr. GRPO (Liu et al. 2025)
    ``sequence_sum``  1              1           Luspo; verl ``seq-mean-token-sum``
    ================= ============== =========== =====================================================================

    Args:
        mask: bool [T], which tokens are trained.
        aggregation: see above.
        max_length: the constant of ``dr_grpo``, tokens: the longest completion allowed, not the longest found.

    Raises:
        ValueError: ``dr_grpo`` without a ``max_length``, or no such aggregation.
    """
    chosen = np.asarray(mask, dtype=bool)
    tokens = int(chosen.sum())
    if aggregation == "dr_grpo" and max_length < 1:
        raise ValueError("the aggregation dr_grpo divides by max_length, 1 or more")
    by = {"token_mean": 1, "sequence_mean": max(1, tokens), "dr_grpo": max_length, "sequence_sum": 1}
    if aggregation not in by:
        raise ValueError(f"no aggregation {aggregation!r}; there are {', '.join(by)}")
    return TokenWeights(chosen / by[aggregation], float(tokens if aggregation == "token_mean" else 1))


def truncated_importance_weights(
    logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    cap: float = 2.0,
    floor: float = 0.0,
    mode: Truncation = "token_truncate",
) -> Float64Array:
    """Return constant weights that correct for a sampler whose numbers differ from the trainer's.

    ``w = exp(logprobs - sampler_logprobs)``, per token or of the whole sequence's sum, then cut to [floor, cap]
    (``truncate``; Yao et al. 2025) or set to 0 outside (``mask``; with a floor, IcePop's). The modes are TRL's
    ``vllm_importance_sampling_mode`` (cap 3 there, 2 in verl). Multiply them into a policy loss's ``weights``; its KL
    and entropy terms are then weighted too, which TRL's KL is not.

    Args:
        logprobs: [T], nats, of the sampled tokens by the trainer with the weights that sampled.
        sampler_logprobs: [T], nats, as the sampler reported them, under the same temperature.
        mask: bool [T], trained positions; the others get 0 and do not count for a sequence. None: all.
        cap: the largest weight.
        floor: the smallest.
        mode: see above.
    """
    chosen = np.ones(np.shape(logprobs), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    log = np.where(chosen, np.asarray(logprobs, np.float64) - np.asarray(sampler_logprobs, np.float64), 0.0)
    if mode.startswith("sequence"):
        log = np.full(log.shape, float(log.sum()))
    w = np.exp(np.clip(log, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    cut = np.clip(w, floor, cap)
    return np.where(chosen & (mode.endswith("truncate") | (cut == w)), cut, 0.0)


def k1(logprobs: ArrayLike, reference_logprobs: ArrayLike) -> Float64Array:
    """Return ``log p - log q`` per token (Schulman 2020). On samples of p: unbiased for KL(p || q), gradient zero."""
    return np.asarray(logprobs, np.float64) - np.asarray(reference_logprobs, np.float64)


def k2(logprobs: ArrayLike, reference_logprobs: ArrayLike) -> Float64Array:
    """Return ``(log p - log q)^2 / 2`` per token (Schulman 2020). On samples of p: biased, gradient of KL(p || q)."""
    return np.square(k1(logprobs, reference_logprobs)) / 2


def k3(logprobs: ArrayLike, reference_logprobs: ArrayLike) -> Float64Array:
    """Return ``q / p - 1 - log(q / p)`` per token (Schulman 2020), never negative.

    On samples of p: unbiased for KL(p || q), but its gradient is that of KL(q || p). The log-ratio is cut to plus or
    minus 20 (as verl's, which also cuts the value to 10; TRL cuts nothing).
    """
    d = np.clip(-k1(logprobs, reference_logprobs), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return np.expm1(d) - d


def entropy_estimate(logprobs: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Return the mean of ``-logprob`` over sampled tokens, nats: the policy's entropy per token, estimated.

    Unbiased on samples of the policy at temperature 1 (Tinker cookbook's ``optim/entropy``); a number to watch, not a
    loss: see ``entropy_coef``. 0 without tokens.
    """
    x = np.asarray(logprobs, dtype=np.float64)
    chosen = x if mask is None else x[np.asarray(mask, dtype=bool)]
    return -float(chosen.mean()) if chosen.size else 0.0


def explained_variance(values: ArrayLike, returns: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Return ``1 - Var(R - V) / Var(R)``: 1 for perfect values, 0 for a constant, below 0 for worse (SB3, CleanRL).

    NaN where the returns do not vary, or there are none.
    """
    v, r = np.asarray(values, dtype=np.float64), np.asarray(returns, dtype=np.float64)
    if mask is not None:
        chosen = np.asarray(mask, dtype=bool)
        v, r = v[chosen], r[chosen]
    if not r.size or r.max() == r.min():
        return float("nan")
    return 1.0 - float((r - v).var() / r.var())
