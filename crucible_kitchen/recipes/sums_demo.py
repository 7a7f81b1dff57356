"""The demo: the built-in model learns two-digit sums, measured before and after on rows it never saw."""

from crucible_kitchen.workflow.recipe import Recipe
from crucible_kitchen.workflows.supervised import supervised

__all__ = ["sums_demo"]

sums_demo = Recipe(
    "sums_demo",
    supervised,
    {
        "model": "tiny",
        "dataset": "sums",
        "epochs": 6,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "warmup": 0.05,
        "eval_at_start": True,
        "eval_every": 150,
        "eval_size": 500,
        "eval_max_tokens": 8,
        "register_as": "sums-tiny",
    },
    description="The built-in tiny model learns two-digit sums: about a minute on two cores",
)
