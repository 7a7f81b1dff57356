"""The manifest of a run: everything needed to say what was run, on what, and whether it can be repeated exactly.

Plain facts as JSON; no secret, no dataset row. Read next: ``crucible_kitchen.kitchen``.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from crucible_kitchen.config import RunConfig, config_hash
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.types import JsonObject
from crucible_kitchen.workflow.describe import text
from crucible_kitchen.workflow.nodes import Workflow

__all__ = ["build_manifest", "package_versions"]

PACKAGES = ("crucible-kitchen", "numpy", "torch", "transformers", "peft", "anyio", "pydantic")


def build_manifest(workflow: Workflow, recipe: str, config: RunConfig, adapters: Mapping[str, Any]) -> JsonObject:
    """Return the manifest of a run that is about to start."""
    capabilities = _training_capabilities(adapters)
    reproducible, why = _reproducible(capabilities)
    return {
        "recipe": recipe,
        "workflow": workflow.name,
        "workflow_hash": hashlib.sha256(text(workflow).encode()).hexdigest(),
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "seed": config.seed,
        "versions": package_versions(),
        "adapters": {port: _adapter(adapter) for port, adapter in adapters.items() if adapter is not None},
        "capabilities": _plain(capabilities),
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
        "reproducible": reproducible,
        "reproducible_because": why,
        "synthetic": any(getattr(a, "synthetic", False) for a in adapters.values() if a is not None),
    }


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    return dict(_versions())


def _training_capabilities(adapters: Mapping[str, Any]) -> TrainingCapabilities | None:
    client = adapters.get("training_client")
    return client.capabilities if client is not None else None


def _reproducible(capabilities: TrainingCapabilities | None) -> tuple[bool, str]:
    if capabilities is None:
        return True, "nothing is trained"
    if capabilities.reproducible:
        return True, "the training backend repeats its results bit for bit on equal seeds and threads"
    return False, "the training backend does not promise equal bits for equal seeds"


def _plain(capabilities: TrainingCapabilities | None) -> JsonObject:
    return {} if capabilities is None else asdict(capabilities) | {"losses": sorted(capabilities.losses)}


def _adapter(adapter: Any) -> JsonObject:
    kind = type(adapter)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "options": adapter.public_options()}
