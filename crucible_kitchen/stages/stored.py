"""Stored weights as a starting point: fetched into the run's directory, once, and opened under their path.

Knows the registry and the blob store, no backend. Read next: ``crucible_kitchen.stages.teachers``.
"""

from typing import TypeVar

from crucible_kitchen.config import ModelConfig
from crucible_kitchen.errors import ConfigError
from crucible_kitchen.ports import BlobStore, ModelRegistry
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run

__all__ = ["fetched", "found_locally", "model_at"]

C = TypeVar("C", bound=ModelConfig)


async def fetched(uri: str, label: str, blob_store: BlobStore | None, run: Run) -> str:
    """Write stored weights into the run's directory, unless an earlier attempt did; return where they are.

    Raises:
        ConfigError: there is no blob store to fetch them from.
        BlobNotFound: it does not have them.
    """
    if blob_store is None:
        raise ConfigError("stored weights need a blob store to fetch them from", hint="--adapter blob_store=files")
    directory = run.directory / label
    if not await run_sync(directory.exists):
        await blob_store.get_tree(uri, directory)
    return str(directory)


async def found_locally(
    model: str, label: str, model_registry: ModelRegistry | None, blob_store: BlobStore | None, run: Run
) -> str:
    """Return a name that a training client knows; a registered version, ``name:version``, is fetched.

    Raises:
        VersionNotFound: the registry has no such version.
    """
    name, colon, version = model.rpartition(":")
    if not colon or model_registry is None or "/" in version or "\\" in version:
        return model
    found = await model_registry.get(name, int(version) if version.isdecimal() else version)
    return await fetched(found.uri, label, blob_store, run)


def model_at(config: C, directory: str) -> C:
    """Return a config of the same training that starts from weights in a directory."""
    lora = config.lora()
    return config.model_copy(update={"model": directory, "lora_rank": lora.rank if lora is not None else 0})
