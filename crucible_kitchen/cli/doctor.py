"""``doctor``: what is installed, which adapters can be used, and what to install for the rest.

It asks the machine and leaves nothing on it. Read next: ``crucible_kitchen.registry``.
"""

import os
import platform
import re
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crucible_kitchen.cli.console import FAILED, answer, answer_json, reporting, table
from crucible_kitchen.cli.options import DEFAULT_HOME, HomeOption, JsonOption

if TYPE_CHECKING:
    from crucible_kitchen.registry import Registry

__all__ = ["adapter_rows", "doctor"]

DISTRIBUTION = "crucible-kitchen"
NEEDS = {
    "training_client.torch": ("torch", "torch"),
    "dataset_store.huggingface": ("datasets", "data"),
}
"""The package without which a shipped adapter can do nothing, and the extra that brings it."""

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?P<rest>[^;]*)(?:;(?P<marker>.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")


@reporting
def doctor(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Say what is installed, what can be used, what to install."""
    found = examination(home)
    if as_json:
        answer_json(found)
    else:
        _show(found)
    if not found["ok"]:
        raise typer.Exit(FAILED)


def examination(home: Path) -> dict[str, Any]:
    """Return everything that ``doctor`` says; ``ok`` is whether the embedded defaults work."""
    from crucible_kitchen.registry import Registry

    adapters = adapter_rows(Registry.discover())
    place = _home(home)
    problems = [
        f"the default adapter {row['port']}.{row['name']} cannot be used: {row['problem']}"
        for row in adapters
        if row["default"] and not row["usable"]
    ]
    if place["problem"]:
        problems.append(place["problem"])
    core, extras = _packages()
    problems += [f"the package {name} is not installed" for name, found in core.items() if found is None]
    return {
        "ok": not problems,
        "problems": problems,
        "version": _version(DISTRIBUTION),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": core,
        "extras": extras,
        "torch": _torch(),
        "adapters": adapters,
        "home": place,
    }


def adapter_rows(registry: "Registry") -> list[dict[str, Any]]:
    """Return every adapter: port, name, whether it is a default, whether it can be used, and if not, what to do."""
    from crucible_kitchen.plans import DEFAULT_ADAPTERS

    rows = []
    for full in registry.adapters:
        port, _, name = full.partition(".")
        problem, install = _trouble(registry, port, name)
        rows.append(
            {
                "port": port,
                "name": name,
                "default": DEFAULT_ADAPTERS.get(port) == name,
                "usable": problem is None,
                "problem": problem,
                "install": install,
            }
        )
    return sorted(rows, key=lambda row: (row["port"], not row["default"], row["name"]))


def _trouble(registry: "Registry", port: str, name: str) -> tuple[str | None, str | None]:
    """Return why an adapter cannot be used and the line that installs what it lacks, or two Nones."""
    from crucible_kitchen.errors import AdapterError, MissingExtra

    package, extra = NEEDS.get(f"{port}.{name}", (None, None))
    if package is not None and find_spec(package) is None:
        error = MissingExtra(package, extra or "")
        return error.message, error.hint
    try:
        registry.adapter_class(port, name)
    except MissingExtra as error:
        return error.message, error.hint
    except AdapterError as error:
        return error.message, None
    return None, None


def _packages() -> tuple[dict[str, str | None], list[dict[str, Any]]]:
    """Return the versions of the packages that are always needed, and the extras with what each one lacks."""
    core: dict[str, str | None] = {}
    extras: dict[str, dict[str, str | None]] = {}
    for line in requires(DISTRIBUTION) or ():
        match = _REQUIREMENT.match(line)
        assert match is not None
        name, extra = match["name"], _EXTRA.search(match["marker"] or "")
        if extra is None:
            core[name] = _version(name)
        elif name != DISTRIBUTION:
            extras.setdefault(extra["extra"], {})[name] = _version(name)
    rows = [
        {
            "extra": extra,
            "installed": all(packages.values()),
            "packages": packages,
            "missing": [name for name, found in packages.items() if found is None],
            "install": f"pip install '{DISTRIBUTION}[{extra}]'",
        }
        for extra, packages in extras.items()
    ]
    return core, rows


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any] | None:
    """Return torch's version, devices and threads; None where it is not installed."""
    if find_spec("torch") is None:
        return None
    import importlib

    torch = importlib.import_module("torch")  # by name: the core has no dependence on it
    gpu = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "device": "cuda" if gpu else "cpu",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if gpu else [],
        "threads": torch.get_num_threads(),
    }


def _home(home: Path) -> dict[str, Any]:
    """Return whether state can be kept below a directory, which need not exist yet."""
    path = home.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    writable = _can_write(there)
    free = shutil.disk_usage(there).free
    problem = None
    if not writable:
        problem = f"the home {path} cannot be written; give another: --home DIR or CRUCIBLE_HOME"
    return {"path": str(path), "exists": path.exists(), "writable": writable, "free_bytes": free, "problem": problem}


def _can_write(directory: Path) -> bool:
    """Try it, with a file that is gone at once: permissions alone do not tell of read-only or special systems."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"?")
    except OSError:
        return False
    return True


def _show(found: dict[str, Any]) -> None:
    answer(f"crucible-kitchen {found['version']} on Python {found['python']}, {found['platform']}")
    torch = found["torch"]
    answer(
        f"torch {torch['version']} on {torch['device']} with {torch['threads']} threads"
        if torch
        else "torch is not installed"
    )
    place = found["home"]
    state = "writable" if place["writable"] else "not writable"
    answer(f"home {place['path']}, {state}, {place['free_bytes'] / 1e9:.1f} GB free")
    answer()
    rows = [
        (
            row["port"],
            row["name"],
            "default" if row["default"] else "",
            "usable" if row["usable"] else row["problem"],
            row["install"],
        )
        for row in found["adapters"]
    ]
    table(("port", "adapter", "", "state", "to install"), rows)
    answer()
    packages = [
        (row["extra"], name, version or "missing", "" if version else row["install"])
        for row in found["extras"]
        if row["extra"] != "all"  # which brings what the others bring
        for name, version in row["packages"].items()
    ]
    table(("extra", "package", "version", "to install"), packages)
    answer()
    for problem in found["problems"]:
        answer(f"problem: {problem}")
    answer("ready" if found["ok"] else "the embedded defaults cannot work until this is solved")
