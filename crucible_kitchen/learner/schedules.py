"""The course of the learning rate: warm-up, then constant, linear, cosine, polynomial or exponential.

Pure; it knows no optimizer and no config. Read next: ``crucible_kitchen.learner.hyperparams``.
"""

import math
from typing import Literal

__all__ = ["Schedule", "learning_rate", "warmup_steps"]

Schedule = Literal["constant", "linear", "cosine", "polynomial", "exponential"]


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Return the number of warm-up steps.

    Args:
        warmup: a share of all steps if below 1, a number of steps otherwise.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: ``warmup`` is negative.
    """
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, is {warmup}")
    steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    return min(steps, total_steps)


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: Schedule = "linear",
    warmup_steps: int = 0,
    end: float = 0.0,
    power: float = 2.0,
) -> float:
    """Return the learning rate of one optimizer step.

    With W warm-up steps of T in all, step k (from 0) has, in units of the peak::

        warm-up, k < W    (k + 1) / W                  the first step is above 0, step W - 1 has the peak
        after it          e + (1 - e) f(p),            p = (k - W) / (T - W), so 0 ≤ p < 1
        constant          f(p) = 1, whatever e
        linear            f(p) = 1 - p
        cosine            f(p) = (1 + cos πp) / 2      Loshchilov & Hutter 2017 (SGDR), equation 5, one period
        polynomial        f(p) = (1 - p)^power
        exponential       e^p instead of e + (1 - e) f(p)

    ``end`` would be reached at step T, which is never taken: the last step, T - 1, still has a rate above 0 and is
    not wasted. The decay of ``linear`` and ``cosine`` is that of the usual implementations; their warm-up begins at 0.

    Args:
        step: the optimizer step, from 0. From ``total_steps`` on the rate stays where the schedule ends.
        total_steps: optimizer steps of the whole run, T.
        peak: the highest rate, 0 or more; the unit of the result.
        schedule: the course after warm-up.
        warmup_steps: W; T or more makes the whole run a warm-up.
        end: where the schedule ends, as a share of the peak, 0 to 1; ``exponential`` needs more than 0.
        power: exponent of the polynomial schedule, above 0.

    Returns:
        The rate, between 0 and ``peak``.

    Raises:
        ValueError: an argument is out of range.
    """
    if step < 0 or total_steps < 0 or warmup_steps < 0 or peak < 0 or not 0 <= end <= 1 or power <= 0:
        raise ValueError(f"out of range: {step=}, {total_steps=}, {warmup_steps=}, {peak=}, {end=}, {power=}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    left = total_steps - warmup_steps
    progress = min(1.0, (step - warmup_steps) / left) if left > 0 else 1.0
    return peak * _share(schedule, progress, end, power)


def _share(schedule: Schedule, progress: float, end: float, power: float) -> float:
    """Return the rate after warm-up in units of the peak; ``progress`` from 0 to 1."""
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return end + (1 - end) * (1 - progress)
        case "cosine":
            return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2
        case "polynomial":
            return end + (1 - end) * math.pow(1 - progress, power)
        case "exponential":
            if end == 0:
                raise ValueError("the exponential schedule needs an end above 0")
            return math.pow(end, progress)
        case _:
            raise ValueError(f"unknown schedule {schedule!r}")
