"""Saved training states: one safetensors file each, written aside, forced to disk, then renamed.

A file holds tensors and, as its metadata, one JSON object. Knows files, not training. Read next: ``trainer.py``.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from torch import Tensor

from crucible_kitchen.errors import BackendUserError, IntegrityError
from crucible_kitchen.types import JsonObject, StateRef
from crucible_kitchen_torch.faults import storage_errors

__all__ = ["delete_state", "read_state", "write_state"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def write_state(directory: Path, name: str, tensors: dict[str, Tensor], facts: JsonObject) -> StateRef:
    """Write a state under a name, in place of an older one of that name; its tensors are contiguous, on the CPU.

    Raises:
        BackendUserError: the name is not a plain file name.
        StorageFull: there is no room; an older state of that name is untouched.
    """
    from safetensors.torch import save_file

    if not _NAME.fullmatch(name):
        raise BackendUserError(
            f"a state cannot be named {name!r}", hint="use letters, digits, dots, dashes, underscores"
        )
    path, aside = directory / f"{name}.safetensors", directory / f".{name}.partial"
    with storage_errors(f"the state {name!r}"):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, aside, metadata={"facts": json.dumps(facts, sort_keys=True)})
            digest = _sync(aside)
            size = aside.stat().st_size
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        _sync_directory(directory)
    return StateRef(path.absolute().as_uri(), int(facts["step"]), digest, size)


def read_state(state: StateRef) -> tuple[dict[str, Tensor], JsonObject]:
    """Read a state back; its hash is checked before its bytes are parsed.

    Raises:
        IntegrityError: the file is gone or its bytes are not those that were saved.
    """
    from safetensors import SafetensorError, safe_open

    path = _path(state)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if state.sha256 and digest != state.sha256:
            raise IntegrityError(f"the state {path.name} does not hold the bytes that were saved", hint=_OLDER)
        with safe_open(path, framework="pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
            return {key: opened.get_tensor(key) for key in opened.keys()}, facts  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the state {path.name} cannot be read: {type(error).__name__}", hint=_OLDER) from error


def delete_state(directory: Path, state: StateRef) -> None:
    """Remove a state's file; one that is gone already is no error.

    Raises:
        BackendUserError: it is not a state of this directory.
    """
    path = _path(state)
    if path.parent != directory.absolute():
        raise BackendUserError("the state was saved by another session", hint="delete it where it was saved")
    path.unlink(missing_ok=True)


def _path(state: StateRef) -> Path:
    return Path(unquote(urlparse(state.uri).path))


_OLDER = "resume from an older checkpoint"


def _sync(path: Path) -> str:
    """Force a file to disk and return its sha256 (hex)."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(directory: Path) -> None:
    """Force a rename to disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
