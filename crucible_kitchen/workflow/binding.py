"""Injection: where the arguments of a stage, a hook or a selector come from.

``run``, ``config`` and the ports' names are reserved; anything else is state. It knows no node. Read next:
``crucible_kitchen.workflow.engine``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from crucible_kitchen.config import RunConfig
from crucible_kitchen.ports import PORTS
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import signature_of

__all__ = ["LATER_PORTS", "PORT_NAMES", "RESERVED", "Binder", "binder_of"]

LATER_PORTS = ("hub_client", "feedback_client", "metrics_store", "embedding_client", "vector_store")
"""Names that are kept for ports which have no adapters yet."""

PORT_NAMES = frozenset(PORTS) | frozenset(LATER_PORTS)
RESERVED = frozenset({"run", "config"}) | PORT_NAMES


@dataclass(frozen=True, slots=True)
class Binder:
    """Where one function's arguments come from, found out once."""

    run: bool
    config: bool
    ports: tuple[tuple[str, Any], ...]
    required: tuple[str, ...]
    optional: tuple[tuple[str, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the state it reads."""
        return (*self.required, *(name for name, _ in self.optional))

    def bind(
        self, values: Mapping[str, Any], config: RunConfig, adapters: Mapping[str, Any], run: Run
    ) -> dict[str, Any]:
        """Return the arguments.

        Raises:
            KeyError: a required name was not written; a checked workflow cannot come here.
        """
        arguments = {name: values[name] for name in self.required}
        for name, default in self.optional:
            arguments[name] = values.get(name, default)
        for name, default in self.ports:
            adapter = adapters.get(name)
            arguments[name] = default if adapter is None else adapter
        if self.config:
            arguments["config"] = config
        if self.run:
            arguments["run"] = run
        return arguments


@lru_cache(maxsize=4096)
def binder_of(fn: Callable[..., Any]) -> Binder:
    """Return where a function's arguments come from."""
    parameters = signature_of(fn).parameters
    state = [p for p in parameters if p.name not in RESERVED]
    return Binder(
        run=any(p.name == "run" for p in parameters),
        config=any(p.name == "config" for p in parameters),
        ports=tuple((p.name, p.default) for p in parameters if p.name in PORT_NAMES),
        required=tuple(p.name for p in state if not p.optional),
        optional=tuple((p.name, p.default) for p in state if p.optional),
    )
