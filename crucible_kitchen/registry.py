"""The registry: names to adapters, workflows and recipes, found through entry points.

What ships with the package enters by the same door as everyone else's. Nothing is imported before it is asked for.
Read next: ``crucible_kitchen.kitchen``.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from crucible_kitchen.errors import AdapterError, CrucibleError, NotFoundError, WorkflowError
from crucible_kitchen.ports import PORTS
from crucible_kitchen.redaction import remember_secret, without_values
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.recipe import Recipe

__all__ = ["Registry"]

GROUPS = ("adapters", "workflows", "recipes", "environments")


@dataclass(frozen=True)
class Registry:
    """Entry points by name: adapters as ``port.name``, workflows and recipes in one namespace."""

    adapters: Mapping[str, EntryPoint]
    workflows: Mapping[str, EntryPoint]
    recipes: Mapping[str, EntryPoint]
    environments: Mapping[str, EntryPoint] = field(default_factory=dict)

    @classmethod
    def discover(cls) -> "Registry":
        """Read the installed packages' entry points.

        Raises:
            WorkflowError: two packages use one name.
        """
        found = {group: _by_name(entry_points(group=f"crucible_kitchen.{group}")) for group in GROUPS}
        both = found["workflows"].keys() & found["recipes"].keys()
        if both:
            raise WorkflowError(
                min(both), [f"{name!r} is a workflow and a recipe; rename one" for name in sorted(both)]
            )
        return cls(**found)

    def adapter_names(self, port: str) -> list[str]:
        """Return the names of a port's adapters."""
        return sorted(name.partition(".")[2] for name in self.adapters if name.partition(".")[0] == port)

    def adapter_class(self, port: str, name: str) -> Any:
        """Return an adapter's class.

        Raises:
            AdapterError: no such port or adapter, or it cannot be imported.
        """
        if port not in PORTS:
            raise AdapterError(f"there is no port {port!r}", hint=_nearest(port, PORTS))
        entry = self.adapters.get(f"{port}.{name}")
        if entry is None:
            known = self.adapter_names(port)
            raise AdapterError(f"the port {port!r} has no adapter {name!r}", hint=_nearest(name, known))
        try:
            return entry.load()
        except CrucibleError:
            raise
        except Exception as error:
            raise AdapterError(
                f"the adapter {port}.{name} cannot be imported: {error}",
                hint="crucible-kitchen doctor says what is missing",
            ) from error

    def build_adapter(self, port: str, name: str, options: Mapping[str, Any], home: Path) -> Any:
        """Return a new adapter.

        Args:
            port: the port.
            name: the adapter's name.
            options: for its constructor.
            home: given to a constructor that has a parameter ``home``.

        Raises:
            AdapterError: an option is unknown or does not fit.
        """
        cls = self.adapter_class(port, name)
        parameters = inspect.signature(cls).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [] if takes_any else [key for key in options if key not in parameters]
        if unknown:
            raise AdapterError(
                f"the adapter {port}.{name} has no option {unknown[0]!r}", hint=_nearest(unknown[0], parameters)
            )
        arguments = dict(options)
        if "home" in parameters:
            arguments.setdefault("home", home)
        for value in arguments.values():
            if isinstance(value, SecretStr):
                remember_secret(value)
        try:
            return cls(**arguments)
        except CrucibleError:
            raise
        except (TypeError, ValueError) as error:
            text = without_values(str(error))
            raise AdapterError(f"the adapter {port}.{name} cannot be built from its options: {text}") from error

    def target(self, name: str) -> Workflow | Recipe:
        """Return a workflow or recipe by name.

        Raises:
            NotFoundError: there is none.
        """
        entry = self.workflows.get(name) or self.recipes.get(name)
        if entry is None:
            known = [*self.workflows, *self.recipes]
            raise NotFoundError(f"there is no workflow or recipe {name!r}", hint=_nearest(name, known))
        loaded = entry.load()
        if not isinstance(loaded, (Workflow, Recipe)):
            raise WorkflowError(name, [f"its entry point {entry.value} is a {type(loaded).__name__}, not a workflow"])
        return loaded


def _by_name(entries: Iterable[EntryPoint]) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entries:
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise WorkflowError(entry.name, [f"two packages offer it: {other.value} and {entry.value}; remove one"])
        found[entry.name] = entry
    return dict(sorted(found.items()))


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"
