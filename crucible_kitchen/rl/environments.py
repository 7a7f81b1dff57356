"""Environments by name: ``sums``, ``gymnasium:CartPole-v1``, ``reasoning_gym:<task>``, found through entry points.

Knows no rollout. Read next: ``crucible_kitchen.ports.environment``.
"""

import difflib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from crucible_kitchen.errors import AdapterError, ConfigError, CrucibleError, NotFoundError
from crucible_kitchen.ports.environment import EnvironmentFactory, EnvironmentSource

__all__ = ["GROUP", "environment_entries", "load_environment", "open_environment"]

GROUP = "crucible_kitchen.environments"


@lru_cache(maxsize=1)
def environment_entries() -> Mapping[str, EntryPoint]:
    """Return the installed environments by name.

    Raises:
        ConfigError: two packages use one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ConfigError(f"two packages offer the environment {entry.name!r}: {other.value} and {entry.value}")
    return dict(sorted(found.items()))


def open_environment(env: str, options: Mapping[str, str] | None = None) -> EnvironmentSource:
    """Return the source that ``env=`` names; nothing is opened and no problem is made yet.

    Args:
        env: ``NAME`` or ``NAME:TASK``.
        options: for the source's constructor.

    Raises:
        NotFoundError: there is no environment of this name.
        ConfigError: no such task, or an option is unknown or does not fit.
        MissingExtra: a package it needs is not installed.
    """
    name, _, task = env.partition(":")
    factory = load_environment(name)
    given = dict(options or {})
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = [key for key in given if key not in parameters or key == "task"]
        if unknown:
            known = ", ".join(key for key in parameters if key != "task") or "none"
            raise ConfigError(f"the environment {name!r} has no option {unknown[0]!r}", hint=f"its options: {known}")
    return factory(task, **given)


def load_environment(name: str) -> EnvironmentFactory:
    """Return what makes sources of an environment.

    Raises:
        NotFoundError: there is no environment of this name.
        AdapterError: it cannot be imported.
    """
    entries = environment_entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"environments: {', '.join(entries) or 'none'}"
        raise NotFoundError(f"there is no environment {name!r}", hint=hint)
    try:
        factory: EnvironmentFactory = entries[name].load()
    except CrucibleError:
        raise
    except Exception as error:
        raise AdapterError(f"the environment {name!r} cannot be imported: {error}") from error
    return factory
