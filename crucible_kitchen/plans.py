"""What is about to be run: names resolved, adapters built, the whole workflow checked, the manifest made.

Nothing has run when a plan is there. It knows names and adapters, no store and no run. Read next:
``crucible_kitchen.kitchen``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from crucible_kitchen.config import RunConfig, build_config
from crucible_kitchen.errors import AdapterError
from crucible_kitchen.manifest import build_manifest
from crucible_kitchen.ports import PORTS
from crucible_kitchen.registry import Registry
from crucible_kitchen.types import JsonObject
from crucible_kitchen.workflow.check import check, ports_of
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.recipe import Recipe

__all__ = ["DEFAULT_ADAPTERS", "AdapterChoice", "Plan", "Planner", "Target", "chosen_before"]

Target: TypeAlias = str | Workflow | Recipe
"""The name of a workflow or recipe, or one itself."""

AdapterChoice: TypeAlias = Any
"""A registered name, a pair of name and options, an instance, or None for none."""

DEFAULT_ADAPTERS: Mapping[str, str] = {
    "training_client": "torch",
    "dataset_store": "files",
    "evaluator": "metrics",
    "model_registry": "sqlite",
    "blob_store": "files",
    "llm_client": "noop",
}


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        recipe: the name it was started as.
        workflow: checked.
        config: of the workflow's class.
        adapters: adapter by port.
        own: those of them that belong to this run alone, to be closed with it.
        manifest: the facts.
    """

    recipe: str
    workflow: Workflow
    config: RunConfig
    adapters: dict[str, Any]
    own: list[Any]
    manifest: JsonObject


class Planner:
    """Makes plans.

    Args:
        registry: the names known.
        choices: the kitchen's adapter by port.
        home: for adapters that keep something on the disk.
        shared: the kitchen's adapters that are built already; what is built from ``choices`` joins them.
    """

    def __init__(
        self, registry: Registry, choices: Mapping[str, AdapterChoice], home: Path, shared: dict[str, Any]
    ) -> None:
        self._registry = registry
        self._choices = choices
        self._home = home
        self._shared = shared

    def plan(
        self,
        target: Target,
        config: Mapping[str, Any] | RunConfig | None,
        adapters: Mapping[str, AdapterChoice] | None = None,
        place: str | None = None,
    ) -> Plan:
        """Resolve, build and check.

        Args:
            target: what is to be run.
            config: its config, as values by key or built already.
            adapters: for this run only.
            place: where the target can be found again, if not by its name.

        Raises:
            ConfigError, WorkflowError, AdapterError: what is wrong, all of it.
        """
        found = self._registry.target(target) if isinstance(target, str) else target
        workflow = found.workflow if isinstance(found, Recipe) else found
        settings = self._config(found, config)
        overrides = {**(found.adapters if isinstance(found, Recipe) else {}), **(adapters or {})}
        chosen, own = self._adapters(workflow, overrides)
        check(workflow, adapters=chosen, config=settings)
        manifest = build_manifest(workflow, found.name, settings, chosen, {**self._choices, **overrides}, place)
        return Plan(found.name, workflow, settings, chosen, own, manifest)

    def _config(self, found: Workflow | Recipe, config: Mapping[str, Any] | RunConfig | None) -> RunConfig:
        if isinstance(config, RunConfig):
            return config
        values = dict(config or {})
        return found.config(values) if isinstance(found, Recipe) else build_config(found.config, values)

    def _adapters(self, workflow: Workflow, overrides: Mapping[str, AdapterChoice]) -> tuple[dict[str, Any], list[Any]]:
        """Return the adapters that a workflow reads, by port, and those among them that belong to this run alone."""
        for port in (*overrides, *self._choices):
            if port not in PORTS:
                raise AdapterError(f"there is no port {port!r}", hint=f"ports: {', '.join(PORTS)}")
        chosen: dict[str, Any] = {}
        own: list[Any] = []
        for port in ports_of(workflow):
            if port in overrides:
                chosen[port] = self._build(port, overrides[port])
                if isinstance(overrides[port], (str, tuple)):
                    own.append(chosen[port])
            elif port in self._choices:
                if port not in self._shared:
                    adapter = self._build(port, self._choices[port])
                    if isinstance(self._choices[port], (str, tuple)):
                        self._shared[port] = adapter
                chosen[port] = self._shared.get(port, None if self._choices[port] is None else self._choices[port])
        return chosen, own

    def _build(self, port: str, choice: AdapterChoice) -> Any:
        if isinstance(choice, str):
            return self._registry.build_adapter(port, choice, {}, self._home)
        if isinstance(choice, tuple):
            name, options = choice
            return self._registry.build_adapter(port, name, options, self._home)
        return choice


def chosen_before(manifest: JsonObject) -> dict[str, AdapterChoice]:
    """Return how a run's adapters were named when it began; instances were not, and secrets are not kept."""
    return {
        port: (facts["name"], facts["given"]) if facts["given"] else facts["name"]
        for port, facts in manifest["adapters"].items()
        if "name" in facts
    }
