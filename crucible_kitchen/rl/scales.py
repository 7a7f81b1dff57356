"""What advantages and values are measured by, handed on from update to update: a few numbers that a checkpoint holds.

Knows numbers, no trajectories. Read next: ``crucible_kitchen.rl.learning``.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from crucible_kitchen.learner import Moments
from crucible_kitchen.types import Float64Array

__all__ = ["Scales"]


@dataclass(frozen=True, slots=True)
class Scales:
    """What an update hands on to the next.

    Adam moves a weight by about the learning rate per step, however large the error, so that a value network which has
    to reach returns of 50 is late by many updates; in units of the returns it has to reach about 1 (van Hasselt et al.
    2016; Andrychowicz et al. 2021, section 3.3). The unit is not adapted later, as theirs is: what was learned keeps
    its meaning.

    Attributes:
        advantages: moments of those seen so far, for ``normalize=running``.
        value_unit: what a value network's 1 stands for, in rewards.
        settled: whether returns have decided the unit.
    """

    advantages: Moments = field(default_factory=Moments)
    value_unit: float = 1.0
    settled: bool = False

    def settled_by(self, returns: Float64Array) -> "Scales":
        """Return these scales with the unit decided: the root mean square of returns [N], unless all are 0."""
        if self.settled or not returns.any():
            return self
        return replace(self, value_unit=float(np.sqrt(np.square(returns).mean())), settled=True)
