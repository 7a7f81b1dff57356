"""The learner's mathematics: pure numpy functions with their sources; no config, no state, nothing of the engine.

Losses are small frozen values that fulfil ``crucible_kitchen.types.Loss``; advantages, returns and estimators are plain
functions. Everything is float64, and sums, never means. ``docs/mathematics.md`` has every formula with its convention.
Names are resolved when they are first used.
Read next: ``crucible_kitchen.learner.returns``.
"""

from typing import TYPE_CHECKING

from crucible_kitchen.lazy import lazily

if TYPE_CHECKING:
    from crucible_kitchen.learner.advantages import STD_CONVENTIONS as STD_CONVENTIONS
    from crucible_kitchen.learner.advantages import Moments as Moments
    from crucible_kitchen.learner.advantages import Normalization as Normalization
    from crucible_kitchen.learner.advantages import StdConvention as StdConvention
    from crucible_kitchen.learner.advantages import centred as centred
    from crucible_kitchen.learner.advantages import dr_grpo as dr_grpo
    from crucible_kitchen.learner.advantages import grpo as grpo
    from crucible_kitchen.learner.advantages import maxrl as maxrl
    from crucible_kitchen.learner.advantages import normalize as normalize
    from crucible_kitchen.learner.advantages import rloo as rloo
    from crucible_kitchen.learner.advantages import whiten as whiten
    from crucible_kitchen.learner.distillation import GeneralizedJSD as GeneralizedJSD
    from crucible_kitchen.learner.distillation import TopKForwardKL as TopKForwardKL
    from crucible_kitchen.learner.distillation import reverse_kl_advantages as reverse_kl_advantages
    from crucible_kitchen.learner.estimators import Aggregation as Aggregation
    from crucible_kitchen.learner.estimators import TokenWeights as TokenWeights
    from crucible_kitchen.learner.estimators import entropy_estimate as entropy_estimate
    from crucible_kitchen.learner.estimators import explained_variance as explained_variance
    from crucible_kitchen.learner.estimators import k1 as k1
    from crucible_kitchen.learner.estimators import k2 as k2
    from crucible_kitchen.learner.estimators import k3 as k3
    from crucible_kitchen.learner.estimators import token_weights as token_weights
    from crucible_kitchen.learner.estimators import truncated_importance_weights as truncated_importance_weights
    from crucible_kitchen.learner.policy import CISPO as CISPO
    from crucible_kitchen.learner.policy import GSPO as GSPO
    from crucible_kitchen.learner.policy import PPO as PPO
    from crucible_kitchen.learner.policy import DecoupledPPO as DecoupledPPO
    from crucible_kitchen.learner.policy import ImportanceSampling as ImportanceSampling
    from crucible_kitchen.learner.policy import ValueLoss as ValueLoss
    from crucible_kitchen.learner.preference import DPO as DPO
    from crucible_kitchen.learner.preference import IPO as IPO
    from crucible_kitchen.learner.preference import KTO as KTO
    from crucible_kitchen.learner.preference import ORPO as ORPO
    from crucible_kitchen.learner.preference import APOZero as APOZero
    from crucible_kitchen.learner.preference import Hinge as Hinge
    from crucible_kitchen.learner.preference import RobustDPO as RobustDPO
    from crucible_kitchen.learner.preference import SimPO as SimPO
    from crucible_kitchen.learner.preference import kto_reference_point as kto_reference_point
    from crucible_kitchen.learner.returns import AdvantageEstimate as AdvantageEstimate
    from crucible_kitchen.learner.returns import discounted_returns as discounted_returns
    from crucible_kitchen.learner.returns import gae as gae
    from crucible_kitchen.learner.returns import kl_shaped_advantages as kl_shaped_advantages
    from crucible_kitchen.learner.returns import kl_shaped_rewards as kl_shaped_rewards
    from crucible_kitchen.learner.reward import BradleyTerry as BradleyTerry
    from crucible_kitchen.learner.terms import EntropyBonus as EntropyBonus
    from crucible_kitchen.learner.terms import Term as Term
    from crucible_kitchen.learner.terms import WeightedSum as WeightedSum

_HOMES = {
    "advantages": (
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
    ),
    "distillation": ("GeneralizedJSD", "TopKForwardKL", "reverse_kl_advantages"),
    "estimators": (
        "Aggregation",
        "TokenWeights",
        "entropy_estimate",
        "explained_variance",
        "k1",
        "k2",
        "k3",
        "token_weights",
        "truncated_importance_weights",
    ),
    "policy": ("CISPO", "GSPO", "PPO", "DecoupledPPO", "ImportanceSampling", "ValueLoss"),
    "preference": ("DPO", "IPO", "KTO", "ORPO", "APOZero", "Hinge", "RobustDPO", "SimPO", "kto_reference_point"),
    "returns": ("AdvantageEstimate", "discounted_returns", "gae", "kl_shaped_advantages", "kl_shaped_rewards"),
    "reward": ("BradleyTerry",),
    "terms": ("EntropyBonus", "Term", "WeightedSum"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - names are strings

__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
