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
from crucible_kitchen.workflow.nodes import Workflow, steps

__all__ = ["build_manifest", "differences", "package_versions"]

PACKAGES = ("crucible-kitchen", "numpy", "torch", "transformers", "peft", "anyio", "pydantic")


def build_manifest(
    workflow: Workflow,
    recipe: str,
    config: RunConfig,
    adapters: Mapping[str, Any],
    choices: Mapping[str, Any] | None = None,
    target: str | None = None,
) -> JsonObject:
    """Return the manifest of a run that is about to start.

    Args:
        workflow: what is run.
        recipe: the name it was started as.
        config: its config.
        adapters: adapter by port.
        choices: how each adapter was named, so that a later attempt can make it again.
        target: where the workflow was found, if not by its name.
    """
    capabilities = _training_capabilities(adapters)
    reproducible, why = _reproducible(capabilities, config)
    return {
        "recipe": recipe,
        "target": target or recipe,
        "workflow": workflow.name,
        "workflow_hash": hashlib.sha256(text(workflow).encode()).hexdigest(),
        "code_hash": _code_hash(workflow),
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "seed": config.seed,
        "versions": package_versions(),
        "adapters": {
            port: _adapter(adapter, (choices or {}).get(port))
            for port, adapter in adapters.items()
            if adapter is not None
        },
        "capabilities": _plain(capabilities),
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
        "decided": {} if capabilities is None else dict(config.decided(capabilities)),
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


def _reproducible(capabilities: TrainingCapabilities | None, config: RunConfig) -> tuple[bool, str]:
    if capabilities is None:
        return True, "nothing is trained"
    why = config.unrepeatable()
    if why is not None:
        return False, why
    if capabilities.reproducible:
        return True, "the training backend repeats its results bit for bit on equal seeds and threads"
    return False, "the training backend does not promise equal bits for equal seeds"


def _plain(capabilities: TrainingCapabilities | None) -> JsonObject:
    return {} if capabilities is None else asdict(capabilities) | {"losses": sorted(capabilities.losses)}


def _adapter(adapter: Any, choice: Any) -> JsonObject:
    kind = type(adapter)
    facts = {"class": f"{kind.__module__}.{kind.__qualname__}", "options": adapter.public_options()}
    name, given = choice if isinstance(choice, tuple) else (choice, {})
    if isinstance(name, str):
        shown = {key: value for key, value in given.items() if facts["options"].get(key, _ABSENT) == value}
        facts |= {"name": name, "given": shown, "withheld": sorted(given.keys() - shown.keys())}
    return facts


_ABSENT = object()


def _code_hash(workflow: Workflow) -> str:
    """Return a hash of the code of the workflow's own stages, without what they call."""
    digest = hashlib.sha256()
    for path, step in steps(workflow):
        digest.update(path.encode())
        _hash_code(digest, getattr(step.fn, "__code__", None))
    return digest.hexdigest()


def _hash_code(digest: Any, code: Any) -> None:
    if code is None:
        return
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            _hash_code(digest, constant)
        else:  # the order of a set is another in every process
            settled = sorted(constant, key=repr) if isinstance(constant, frozenset) else constant
            digest.update(repr(settled).encode())


def differences(before: JsonObject, now: JsonObject) -> dict[str, tuple[Any, Any]]:
    """Return what would make a resumed run another run: config keys, workflow, code, versions, adapters.

    Each by the name under which it can be allowed, with what was and what is.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name, part, other in (
        *_pairs(before["config"], now["config"]),
        *_pairs(before["versions"], now["versions"]),
        *_pairs(_identities(before), _identities(now)),
        ("workflow", before["workflow_hash"][:12], now["workflow_hash"][:12]),
        ("code", before["code_hash"][:12], now["code_hash"][:12]),
    ):
        if part != other:
            found[name] = (part, other)
    return found


def _pairs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before.get(name), now.get(name)) for name in (*before, *(n for n in now if n not in before))]


def _identities(manifest: JsonObject) -> dict[str, str]:
    """Return what each adapter is, as far as results depend on it."""
    return {port: f"{a['class']} {sorted(a['options'].items())}" for port, a in manifest["adapters"].items()}
