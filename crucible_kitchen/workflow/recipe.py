"""Recipes: what to train, as a workflow with vetted defaults and the adapters it wants.

A cookbook is a package of recipes. A recipe knows no engine. Read next: ``crucible_kitchen.recipes``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crucible_kitchen.config import RunConfig, build_config
from crucible_kitchen.workflow.nodes import Workflow

__all__ = ["Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A workflow with defaults.

    Attributes:
        name: on the command line and in the manifest; shares one namespace with workflows.
        workflow: how it trains.
        defaults: config values that differ from the workflow's own defaults; the user's win over them.
        adapters: adapter name by port, where the recipe wants another than the kitchen's default.
        description: one line for people.

    Example::

        sl_basic = Recipe("sl_basic", supervised, {"model": "my/model", "epochs": 1}, description="Basic fine-tuning")
    """

    name: str
    workflow: Workflow
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    description: str = ""

    def config(self, values: Mapping[str, Any]) -> RunConfig:
        """Return the config of a run: the user's values over the recipe's defaults.

        Raises:
            ConfigError: a key is unknown or a value does not fit.
        """
        return build_config(self.workflow.config, {**self.defaults, **values})
