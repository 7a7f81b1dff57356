"""Registry stages: register the trained model with what it came from.

They know the model registry port only. Read next: ``crucible_kitchen.ports.model_registry``.
"""

from typing import Any, Protocol

from crucible_kitchen.config import ModelConfig, RegistryConfig
from crucible_kitchen.events import ModelRegistered
from crucible_kitchen.ports import ModelRegistry, TrainingSession
from crucible_kitchen.types import BlobRef, ModelVersion
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = ["RegisterConfig", "check_parent", "parent_given", "register_model", "registry_given"]


class RegisterConfig(ModelConfig, RegistryConfig):
    """What registering depends on."""


class TrainedOn(Protocol):
    """What a model was trained on: a plan of rows, or environments."""

    @property
    def name(self) -> str:
        """The dataset's or the environment's name."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints are equal rows or problems."""
        ...


def registry_given(model_registry: ModelRegistry | None) -> bool:
    """Whether there is a registry."""
    return model_registry is not None


def parent_given(config: RegistryConfig) -> bool:
    """Whether the model is said to have grown out of a registered one."""
    return bool(config.parent_model)


@stage()
async def check_parent(config: RegistryConfig, model_registry: ModelRegistry | None = None) -> None:
    """Make sure, before anything is trained, that the parent is registered: a lineage must not lie."""
    if model_registry is not None:
        name, _, version = config.parent_model.rpartition(":")
        await model_registry.get(name, int(version) if version.isdecimal() else version)


@stage(writes="registered_model")
async def register_model(
    session: TrainingSession,
    final_weights: BlobRef,
    data: TrainedOn,
    config: RegisterConfig,
    run: Run,
    model_registry: ModelRegistry | None = None,
    eval_results: dict[str, Any] | None = None,
) -> ModelVersion:
    """Register the weights as a new version of the model, with their lineage and what was measured."""
    assert model_registry is not None, "guarded by registry_given"
    name = config.register_as or default_name(run.recipe, config.model, data.name)
    version = await model_registry.register(
        name,
        final_weights.uri,
        lineage=lineage(config, data, session, run),
        metrics=eval_results or {},
        idempotency_key=run.idempotency_key,
        synthetic=session.capabilities.synthetic,
    )
    run.emit(ModelRegistered(model_id=version.id, model_name=version.name, version=version.version, uri=version.uri))
    return version


@register_model.rollback
async def _unregister(registered_model: ModelVersion, model_registry: ModelRegistry | None = None) -> None:
    if model_registry is not None:
        await model_registry.delete(registered_model.name, registered_model.version)


def default_name(recipe: str, model: str, dataset: str) -> str:
    """Return a registry name made of the run's recipe, model and dataset: ``supervised-tiny-sums``."""
    parts = (recipe, _short(model), _short(dataset))
    return "-".join("".join(c if c.isalnum() or c in "._-" else "_" for c in part) for part in parts)


def _short(name: str) -> str:
    """Return the last part of a path or hub id, without the ending of a data or model file."""
    last = name.rstrip("/").rpartition("/")[2]
    stem, _, ending = last.rpartition(".")
    return stem if stem and ending in ("jsonl", "json", "csv", "tsv", "parquet", "gguf") else last


def lineage(config: RegisterConfig, data: TrainedOn, session: TrainingSession, run: Run) -> dict[str, Any]:
    """Return what a model came from, as JSON."""
    manifest = run.manifest
    return {
        "run": run.id,
        "recipe": run.recipe,
        "workflow_hash": manifest.get("workflow_hash"),
        "config_hash": manifest.get("config_hash"),
        "seed": run.seed,
        "base_model": config.model,
        "parent_model": config.parent_model or None,
        "dataset": data.name,
        "dataset_fingerprint": data.fingerprint,
        "steps": session.position,
        "versions": manifest.get("versions"),
        "reproducible": manifest.get("reproducible"),
    }
