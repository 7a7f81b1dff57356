"""Port ``model_registry``: versions of models, what they came from, and which one is in use."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from crucible_kitchen.types import JsonObject, ModelVersion

__all__ = ["ModelRegistry"]


@runtime_checkable
class ModelRegistry(Protocol):
    """Versions with lineage.

    Guarantees: versions of a name count 1, 2, 3 without gaps under concurrency; registering again with the same
    idempotency key returns the first answer; an alias moves only by compare-and-set.
    """

    @property
    def synthetic(self) -> bool:
        """See ``Adapter``."""
        ...

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
        """Register a new version; ``lineage`` may name a ``parent_model`` as ``name:version``."""
        ...

    async def get(self, name: str, version: int | str) -> ModelVersion:
        """Return a version by number or alias.

        Raises:
            VersionNotFound: there is none.
        """
        ...

    async def versions(self, name: str | None = None) -> list[ModelVersion]:
        """Return all versions of a model, or of all models, oldest first."""
        ...

    async def set_alias(self, name: str, alias: str, version: int, *, expected: int | None) -> None:
        """Point an alias at a version if it points at ``expected`` now (None: it must not exist yet).

        Raises:
            Conflict: it points elsewhere.
            VersionNotFound: there is no such version.
        """
        ...

    async def set_stage(self, name: str, version: int, stage: str) -> ModelVersion:
        """Move a version to ``candidate``, ``staging``, ``production`` or ``archived``.

        Raises:
            Conflict: the version is synthetic and the stage is ``staging`` or ``production``.
            VersionNotFound: there is no such version.
        """
        ...

    async def lineage(self, name: str, version: int | str) -> Sequence[ModelVersion]:
        """Return the version and its ancestors, nearest first."""
        ...

    async def delete(self, name: str, version: int) -> None:
        """Remove a version (compensation of a failed run). Idempotent; its number is not used again."""
        ...

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        ...

    async def aclose(self) -> None:
        """See ``Adapter``."""
        ...
