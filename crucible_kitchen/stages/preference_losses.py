"""Which preference loss is meant by a config, and what its sums mean.

Knows the learner's losses, no session. Read next: ``crucible_kitchen.learner.preference``.
"""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from crucible_kitchen.config import RunConfig, refuse_unused
from crucible_kitchen.learner.preference import DPO, IPO, KTO, ORPO, APOZero, Hinge, RobustDPO, SimPO
from crucible_kitchen.types import Loss

__all__ = ["PreferenceLossConfig", "preference_metrics"]

_WITHOUT_REFERENCE = ("simpo", "orpo")
_BETA = {"simpo": 2.0}

_OWN_KEYS: Mapping[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "robust"),
    "simpo_gamma": ("simpo",),
    "orpo_nll": ("orpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": ("sigmoid", "robust", "ipo", "hinge", "apo_zero", "kto"),
}
"""Keys that some losses read only; for the others, giving one is an error."""


class PreferenceLossConfig(RunConfig):
    """What is minimised."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "apo_zero", "simpo", "orpo", "kto"] = "sigmoid"
    """``sigmoid`` is DPO. All compare pairs but ``kto``, which takes single answers."""

    dpo_beta: float | None = Field(default=None, gt=0)
    """Weight of the difference from the reference. Unset: 0.1; ``simpo``: 2."""

    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """Share of pairs thought to be the wrong way round. Unset: 0; ``robust``: 0.1."""

    simpo_gamma: float = Field(default=0.5, ge=0)
    """The margin that ``simpo`` asks for."""

    orpo_nll: float = Field(default=1.0, ge=0)
    """Weight of the likelihood of the chosen answer in ``orpo``."""

    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of wanted answers in ``kto``."""

    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of unwanted answers in ``kto``."""

    reference: str = ""
    """The frozen reference model; unset: the model as it is before its first step."""

    @property
    def paired(self) -> bool:
        """Whether the loss compares two answers."""
        return self.loss != "kto"

    @property
    def has_reference(self) -> bool:
        """Whether the loss reads a reference's log-probabilities."""
        return self.loss not in _WITHOUT_REFERENCE

    @property
    def beta(self) -> float:
        """The beta that is used."""
        return _BETA.get(self.loss, 0.1) if self.dpo_beta is None else self.dpo_beta

    def make_loss(self) -> Loss:
        """Return the loss."""
        beta = self.beta
        match self.loss:
            case "sigmoid":
                return DPO(beta=beta, label_smoothing=self.label_smoothing or 0.0)
            case "robust":
                return RobustDPO(
                    beta=beta, label_smoothing=0.1 if self.label_smoothing is None else self.label_smoothing
                )
            case "ipo":
                return IPO(beta=beta)
            case "hinge":
                return Hinge(beta=beta)
            case "apo_zero":
                return APOZero(beta=beta)
            case "simpo":
                return SimPO(beta=beta, gamma=self.simpo_gamma)
            case "orpo":
                return ORPO(beta=beta, nll=self.orpo_nll)
            case "kto":
                return KTO(
                    beta=beta,
                    desirable_weight=self.desirable_weight,
                    undesirable_weight=self.undesirable_weight,
                )

    @model_validator(mode="after")
    def _keys_belong_to_the_loss(self) -> Self:
        refuse_unused(self, "loss", _OWN_KEYS)
        return self


def preference_metrics(loss: float, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the means of a step or an evaluation from the sums that losses report.

    With single answers (KTO) the rewards are means over the wanted and over the unwanted ones; a kind that is absent
    counts as 0.

    Args:
        loss: the mean loss.
        sums: of ``pairs`` or ``rows``, ``accuracy``, rewards.
    """
    if "pairs" in sums:
        wanted = unwanted = total = sums["pairs"]
    else:
        total, wanted = sums["rows"], sums["desirable"]
        unwanted = total - wanted
    chosen = sums["chosen_reward"] / wanted if wanted else 0.0
    rejected = sums["rejected_reward"] / unwanted if unwanted else 0.0
    return {
        "loss": loss,
        "accuracy": sums["accuracy"] / total,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
