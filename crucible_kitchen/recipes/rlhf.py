"""RLHF in small: the built-in model is tuned on sums, a reward model learns to compare, the policy learns from it."""

from crucible_kitchen.workflow.recipe import Recipe
from crucible_kitchen.workflows.rlhf import rlhf_workflow

__all__ = ["rlhf"]

rlhf = Recipe(
    "rlhf",
    rlhf_workflow,
    {"model": "tiny", "dataset": "sums"},
    description="Supervised fine-tuning, then a reward model, then reinforcement learning on its scores",
)
