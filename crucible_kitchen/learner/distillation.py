"""Distillation: reverse KL as advantages, forward KL on a teacher's top tokens, the generalised JSD. Float64.

Knows log-probabilities and logits, not models. Read next: ``crucible_kitchen.learner.policy``.

Which needs what: :func:`reverse_kl_advantages` the sampled tokens' log-probabilities under both models (any backend);
:class:`TopKForwardKL` the student's log-probabilities of k given tokens per position; :class:`GeneralizedJSD` all its
logits. The derivatives of the last two are by what they are given, so a backend needs the capability of that name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from crucible_kitchen.learner.numerics import log1mexp, log_softmax, loss_input, spread, trained
from crucible_kitchen.learner.returns import discounted_returns
from crucible_kitchen.types import Array, Float64Array, LossValue

__all__ = ["GeneralizedJSD", "TopKForwardKL", "reverse_kl_advantages"]


def reverse_kl_advantages(
    student_logprobs: ArrayLike,
    teacher_logprobs: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    coefficient: float = 1.0,
    discount: float = 0.0,
) -> Float64Array:
    """Return ``A_t = -c * (log student_t - log teacher_t)`` of tokens that the student sampled.

    With the loss ``importance_sampling`` this is the policy gradient of the reverse KL per token, later tokens ignored
    (Agarwal et al. 2024, on-policy GKD; the Tinker cookbook's on-policy distillation; prime-rl). With a ``discount`` g
    a token also answers for what follows it, ``sum_k g^k A_{t+k}``; the gradient of the sequence's KL is g = 1. Holes
    are 0 and take no step of discount (the cookbook's discount counts them).

    Args:
        student_logprobs: [..., T], nats, under the student that sampled; time in the last axis, one sequence per row.
        teacher_logprobs: [..., T], nats, of the same tokens under the teacher, whose tokenizer must be the same.
        mask: bool [..., T], True where the student sampled. None: everywhere. Elsewhere inputs may be anything.
        coefficient: c, advantage per nat.
        discount: g, 0 to 1.

    Raises:
        ValueError: shapes differ, a number that is read is not finite, or the discount is outside [0, 1].
    """
    student, teacher = (np.asarray(x, dtype=np.float64) for x in (student_logprobs, teacher_logprobs))
    chosen = np.ones(student.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if not student.shape == teacher.shape == chosen.shape:
        raise ValueError(f"shapes differ: student {student.shape}, teacher {teacher.shape}, mask {chosen.shape}")
    own = np.zeros(student.shape)
    own[chosen] = -coefficient * (student[chosen] - teacher[chosen])
    last = np.zeros(own.shape, dtype=bool)
    last[..., -1:] = True
    return discounted_returns(own, gamma=discount, terminated=last, mask=chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKForwardKL:
    """``sum_k t_k (log t_k - log s_k)`` over the teacher's k likeliest tokens of each position: soft targets.

    ``rest`` says what becomes of the teacher's other tokens: ``renormalize`` scales its k probabilities to sum 1 and
    compares them with the student's as they are (cross-entropy on soft targets, as the Tinker cookbook's SDFT; the
    student is taught to leave nothing to other tokens); ``tail`` adds one token for the rest of both (TRL's
    ``distillation_add_tail``). TRL's SDFT without a tail also renormalises the *student* over the k.

    Called like a loss, with the student's log-probabilities [T, k] of the teacher's tokens in place of [T]; inputs
    ``weights`` [T] and ``teacher_logprobs`` [T, k] (nats, normalised over the whole vocabulary; -inf for fewer than
    k). The total is the sum over positions of ``weights * KL``; divide by all weights of the optimizer step. The
    derivative is by the student's log-probabilities [T, k], taken as free of each other; the chain rule through
    the softmax is the backend's. Metrics: ``tokens``, and the sum ``kl``.
    """

    rest: Literal["renormalize", "tail"] = "renormalize"

    name: ClassVar[str] = "topk_forward_kl"
    group: ClassVar[int] = 1

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one datum.

        Raises:
            ValueError: an input is missing or of another shape.
        """
        now, inputs = np.asarray(logprobs[0], dtype=np.float64), loss_inputs[0]
        chosen, weights = trained(self.name, inputs, len(now))
        w, s = weights[:, None], now[chosen]
        t = loss_input(self.name, inputs, "teacher_logprobs", now.shape)[chosen]
        p = np.exp(t)
        if self.rest == "renormalize":
            t = t - np.log(p.sum(axis=-1, keepdims=True))
            p = np.exp(t)
        kl, slope = _partial_kl(p, t, s), -p
        if self.rest == "tail":
            left, left_s = (log1mexp(_log_sum(x)) for x in (t, s))
            kl = np.concatenate([kl, np.exp(left) * (left - left_s)], axis=-1)
            slope = slope + np.exp(left - left_s + s)
        metrics = {"tokens": float(len(chosen)), "kl": float(kl.sum())}
        return LossValue(float((w * kl).sum()), [spread(w * slope, chosen, now.shape)], metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralizedJSD:
    """``beta KL(T || M) + (1 - beta) KL(S || M)``, ``M = (1 - beta) S + beta T`` (Agarwal et al. 2024, eq. 1).

    S and T are ``softmax(logits / temperature)``. As in TRL's GKD, beta 0 is the forward KL(T || S) and beta 1 the
    reverse KL(S || T); the formula's own limits there are 0, so the loss jumps: near 0 it is about ``beta`` times the
    forward KL. There is no factor ``temperature^2`` (Hinton et al. 2015 have one, TRL has none), so gradients fall
    with the temperature.

    Called like a loss, with the student's logits [T, V] in place of log-probabilities; inputs ``weights`` [T] and
    ``teacher_logits`` [T, V] (log-probabilities will do). The total is the sum over positions of ``weights * JSD``,
    nats; TRL's ``batchmean`` divides by the batch's tokens, here the optimizer step does. The derivative is by the
    student's logits. Metrics: ``tokens``, and the sum ``jsd``.

    Attributes:
        beta: 0 to 1.
        temperature: above 0, of both.
    """

    beta: float = 0.5
    temperature: float = 1.0

    name: ClassVar[str] = "generalized_jsd"
    group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be from 0 to 1, is {self.beta}")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0, is {self.temperature}")

    def __call__(self, logits: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one datum.

        Raises:
            ValueError: an input is missing or of another shape.
        """
        now, inputs = np.asarray(logits[0], dtype=np.float64), loss_inputs[0]
        chosen, weights = trained(self.name, inputs, len(now))
        w = weights[:, None]
        teacher = loss_input(self.name, inputs, "teacher_logits", now.shape)[chosen]
        s, t = (log_softmax(x / self.temperature) for x in (now[chosen], teacher))
        jsd, slope = self._divergence(s, t)
        d_logits = spread(w * slope / self.temperature, chosen, now.shape)
        metrics = {"tokens": float(len(chosen)), "jsd": float(jsd.sum())}
        return LossValue(float((w * jsd).sum()), [d_logits], metrics)

    def _divergence(self, s: Float64Array, t: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Return the summands of the divergence, and its derivative by the (scaled) student's logits; [n, V] each."""
        ps, pt = np.exp(s), np.exp(t)
        if self.beta == 0:
            return _partial_kl(pt, t, s), ps - pt
        if self.beta == 1:
            m, from_teacher, share = t, np.zeros_like(t), 1.0
        else:
            m = np.logaddexp(s + math.log1p(-self.beta), t + math.log(self.beta))
            from_teacher, share = self.beta * _partial_kl(pt, t, m), 1 - self.beta
        from_student = _partial_kl(ps, s, m)
        slope = share * (from_student - ps * from_student.sum(axis=-1, keepdims=True))
        return from_teacher + share * from_student, slope


def _partial_kl(p: Float64Array, log_p: Float64Array, log_q: Float64Array) -> Float64Array:
    """Return ``p (log p - log q)``, 0 where p is 0."""
    held = p > 0
    found: Float64Array = p * (np.where(held, log_p, 0.0) - np.where(held, log_q, 0.0))
    return found


def _log_sum(x: Float64Array) -> Float64Array:
    """Return the logarithm of a sum of probabilities along the last axis, which is kept."""
    return np.logaddexp.reduce(x, axis=-1, keepdims=True)
