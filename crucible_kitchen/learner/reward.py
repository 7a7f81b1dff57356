"""The loss of a reward model on comparisons. Float64 throughout.

Knows scores, not the head that gives them. Read next: ``crucible_kitchen.learner.advantages``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from crucible_kitchen.learner.numerics import log_sigmoid, loss_input, sigmoid
from crucible_kitchen.types import Array, Float64Array, LossValue

__all__ = ["BradleyTerry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BradleyTerry:
    """``-log sigmoid(s_c - s_r - m) + centring (s_c + s_r)^2``: how likely the chosen answer wins.

    Bradley & Terry 1952; Ouyang et al. 2022, eq. 1; the margin m is Llama 2's (Touvron et al. 2023, eq. 2), the second
    term Eisenstein et al. 2023's, which keeps scores near 0. TRL's ``RewardTrainer`` is the same, averaged over pairs.

    Called like a loss of pairs, chosen first, with the head's scores [T] in place of log-probabilities. The score of an
    answer is ``sum(weights * scores)``: give weight 1 to the one position that is read, usually the last. Input
    ``margin`` [T] is optional and read from the chosen datum at that position. The derivative is by the scores. Totals
    and metrics are sums over pairs: ``pairs``, ``accuracy`` (strictly larger), ``margin``, ``chosen_reward``,
    ``rejected_reward``.

    Attributes:
        centring: coefficient of the second term; 0.01 in the paper.
    """

    centring: float = 0.0

    name: ClassVar[str] = "bradley_terry"
    group: ClassVar[int] = 2

    def __call__(self, scores: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one pair.

        Raises:
            ValueError: an input is missing or of another length, or no position of an answer is read.
        """
        weights = [
            loss_input(self.name, inputs, "weights", len(x)) for x, inputs in zip(scores, loss_inputs, strict=True)
        ]
        if not all(w.any() for w in weights):
            raise ValueError(f"the loss {self.name!r} was given an answer without a position to read")
        good, bad = (
            float(np.where(w != 0, np.asarray(x, np.float64), 0.0) @ w) for w, x in zip(weights, scores, strict=True)
        )
        margin = good - bad
        asked = 0.0
        if "margin" in loss_inputs[0]:
            asked = float(
                loss_input(self.name, loss_inputs[0], "margin", len(weights[0]))[np.flatnonzero(weights[0])[-1]]
            )
        loss = -log_sigmoid(margin - asked) + self.centring * (good + bad) ** 2
        win, pull = -sigmoid(asked - margin), 2 * self.centring * (good + bad)
        metrics = {
            "pairs": 1.0,
            "accuracy": float(margin > 0),
            "margin": margin,
            "chosen_reward": good,
            "rejected_reward": bad,
        }
        return LossValue(loss, [(win + pull) * weights[0], (pull - win) * weights[1]], metrics)
