"""A model registry in memory, complete: versions, aliases, stages, lineage.

It forgets everything with its process. Read next: ``crucible_kitchen.ports.model_registry``.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio.lowlevel

from crucible_kitchen.errors import BackendUserError, Conflict, VersionNotFound
from crucible_kitchen.types import JsonObject, ModelVersion

__all__ = ["NoopModelRegistry"]

_STAGES = ("candidate", "staging", "production", "archived")


class NoopModelRegistry:
    """Keeps versions in dicts. Every method changes them without an await in between, so calls cannot interleave."""

    def __init__(self) -> None:
        self._versions: dict[tuple[str, int], ModelVersion] = {}
        self._highest: dict[str, int] = {}
        self._aliases: dict[tuple[str, str], int] = {}
        self._answers: dict[str, tuple[str, int]] = {}

    @property
    def synthetic(self) -> bool:
        """Always: it is gone with the process."""
        return True

    async def register(
        self,
        name: str,
        uri: str,
        *,
        lineage: Mapping[str, Any],
        metrics: Mapping[str, Any],
        idempotency_key: str,
        synthetic: bool = False,
    ) -> ModelVersion:
        """See ``ModelRegistry``."""
        await anyio.lowlevel.checkpoint()
        if (first := self._answers.get(idempotency_key)) is not None:
            return self._versions[first]
        number = self._highest[name] = self._highest.get(name, 0) + 1
        version = ModelVersion(
            name, number, uri, "candidate", dict(lineage), dict(metrics), time.time(), synthetic=synthetic
        )
        self._versions[name, number] = version
        self._answers[idempotency_key] = (name, number)
        return version

    async def get(self, name: str, version: int | str) -> ModelVersion:
        """See ``ModelRegistry``."""
        await anyio.lowlevel.checkpoint()
        return self._get(name, version)

    async def versions(self, name: str | None = None) -> list[ModelVersion]:
        """See ``ModelRegistry``."""
        await anyio.lowlevel.checkpoint()
        return [version for version in self._versions.values() if name in (None, version.name)]

    async def set_alias(self, name: str, alias: str, version: int, *, expected: int | None) -> None:
        """See ``ModelRegistry``."""
        await anyio.lowlevel.checkpoint()
        if alias.isdecimal():
            raise BackendUserError(f"the alias {alias!r} reads like a version number")
        self._get(name, version)
        current = self._aliases.get((name, alias))
        if current != expected:
            raise Conflict(f"{name}:{alias} points at {current}, not at {expected}", hint="read it and try again")
        self._aliases[name, alias] = version

    async def set_stage(self, name: str, version: int, stage: str) -> ModelVersion:
        """See ``ModelRegistry``."""
        await anyio.lowlevel.checkpoint()
        if stage not in _STAGES:
            raise BackendUserError(f"there is no stage {stage!r}", hint=f"stages: {', '.join(_STAGES)}")
        found = self._get(name, version)
        if found.synthetic and stage in ("staging", "production"):
            raise Conflict(f"{found.id} is synthetic and cannot be promoted", hint="train on a real backend")
        self._versions[name, version] = replace(found, stage=stage)
        return self._versions[name, version]

    async def lineage(self, name: str, version: int | str) -> Sequence[ModelVersion]:
        """See ``ModelRegistry``; ends at an ancestor that is not (or no longer) registered."""
        await anyio.lowlevel.checkpoint()
        chain = [self._get(name, version)]
        while parent := chain[-1].lineage.get("parent_model"):
            parent_name, _, parent_version = str(parent).rpartition(":")
            try:
                ancestor = self._get(parent_name, parent_version)
            except VersionNotFound:
                break
            if ancestor in chain:
                break
            chain.append(ancestor)
        return chain

    async def delete(self, name: str, version: int) -> None:
        """See ``ModelRegistry``; aliases of the version go with it."""
        await anyio.lowlevel.checkpoint()
        if self._versions.pop((name, version), None) is None:
            return
        self._aliases = {key: at for key, at in self._aliases.items() if (key[0], at) != (name, version)}
        self._answers = {key: at for key, at in self._answers.items() if at != (name, version)}

    def public_options(self) -> JsonObject:
        """There are no options."""
        return {}

    async def aclose(self) -> None:
        """Nothing is held."""

    def _get(self, name: str, version: int | str) -> ModelVersion:
        number = int(version) if str(version).isdecimal() else self._aliases.get((name, str(version)))
        found = self._versions.get((name, number)) if number is not None else None
        if found is None:
            raise VersionNotFound(f"there is no {name}:{version}", hint="list the versions of the model")
        return found
