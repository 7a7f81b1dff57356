"""Learning-rate schedules: the rate of each optimizer step as a pure function of its index.

Knows no optimizer. Read next: ``crucible_kitchen.learner.hyperparams``.
"""

import math
from typing import Literal, TypeAlias

__all__ = ["Schedule", "learning_rate", "warmup_steps"]

Schedule: TypeAlias = Literal["constant", "linear", "cosine", "polynomial", "exponential"]


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Return the number of warm-up steps: ``warmup`` is a share of all steps if below 1, else a number of steps.

    It never exceeds ``total_steps``; a share is rounded up.
    """
    # 0.07 * 100 is 7.000000000000001 and means 7
    steps = math.ceil(round(warmup * total_steps, 9)) if warmup < 1 else int(warmup)
    return min(steps, total_steps)


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: Schedule,
    warmup_steps: int = 0,
    end: float = 0.0,
    power: float = 2.0,
) -> float:
    """Return the learning rate of one optimizer step.

    With ``W`` warm-up steps of ``N``, and ``p = (step - W) / (N - W)`` after warm-up::

        warm-up:      peak * (step + 1) / (W + 1)
        constant:     peak
        linear:       peak * (end + (1 - end) * (1 - p))
        cosine:       peak * (end + (1 - end) * (1 + cos(pi p)) / 2)       (Loshchilov & Hutter 2017, eq. 5)
        polynomial:   peak * (end + (1 - end) * (1 - p) ** power)
        exponential:  peak * end ** p

    The first step after warm-up has the peak, and ``p`` would reach 1 one step after the last, so that the last step
    still trains (its rate is above ``peak * end``).

    Args:
        step: index of the step, from 0.
        total_steps: N, 1 or more.
        peak: the highest rate.
        schedule: the course after warm-up.
        warmup_steps: W.
        end: where the schedule ends, as a share of the peak; above 0 for ``exponential``.
        power: exponent of ``polynomial``.

    Raises:
        ValueError: ``step`` is not below ``total_steps``, or ``exponential`` has no ``end``.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is not one of {total_steps} steps")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    p = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "exponential":
        if end <= 0:
            raise ValueError("an exponential schedule needs an end above 0")
        return peak * math.pow(end, p)
    return peak * (end + (1 - end) * _remaining(p, schedule, power))


def _remaining(p: float, schedule: Schedule, power: float) -> float:
    """Return the share of the way down that is still ahead, from 1 to 0."""
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return (1 + math.cos(math.pi * p)) / 2
    return math.pow(1 - p, power if schedule == "polynomial" else 1.0)
