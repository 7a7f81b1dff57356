"""Training states of the toy model: arrays and JSON in one ``.npz`` file, hashed, never pickled.

Knows no session. Read next: ``crucible_kitchen_noop.session``.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from crucible_kitchen.errors import BackendUserError, IntegrityError
from crucible_kitchen.types import Array, JsonObject, StateRef
from crucible_kitchen_noop.files import storing, write_whole

__all__ = ["delete_state", "read_state", "write_state"]


def write_state(directory: Path, name: str, arrays: dict[str, Array], meta: JsonObject) -> StateRef:
    """Write a state under a name, whole or not at all; ``meta["step"]`` is its step."""
    if not name or Path(name).name != name:
        raise BackendUserError(f"{name!r} cannot name a state", hint="use a plain name, without separators")
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    data = buffer.getvalue()
    path = directory / f"{name}.npz"
    with storing(f"the state {name!r}"):
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    return StateRef(str(path), meta["step"], hashlib.sha256(data).hexdigest(), len(data))


def delete_state(directory: Path, state: StateRef) -> None:
    """Remove a state's file; one that is gone already is no error."""
    path = Path(state.uri)
    if path.parent != directory:
        raise BackendUserError("the state was saved by another session", hint="delete it where it was saved")
    path.unlink(missing_ok=True)


def read_state(state: StateRef) -> tuple[dict[str, Any], JsonObject]:
    """Return the arrays and the meta data of a state, once its hash is verified."""
    try:
        data = Path(state.uri).read_bytes()
    except OSError as error:
        raise IntegrityError(f"the state of step {state.step} cannot be read: {error.strerror}") from error
    if state.sha256 and hashlib.sha256(data).hexdigest() != state.sha256:
        raise IntegrityError(f"the state of step {state.step} does not match its hash", hint="load an earlier state")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        meta = json.loads(arrays.pop("meta").tobytes())
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"the state of step {state.step} is damaged", hint="load an earlier state") from error
    return arrays, meta
