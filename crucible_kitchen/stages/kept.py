"""Arrays that are computed once in a run: kept in the blob store under their content's hash, found again on resume.

Knows the blob store, not what the arrays are. Read next: ``crucible_kitchen.stages.preference_data``.
"""

import io
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from crucible_kitchen.ports import BlobStore
from crucible_kitchen.types import Array, BlobRef
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run

__all__ = ["kept"]


async def kept(
    kind: str, key: str, blob_store: BlobStore, run: Run, make: Callable[[], Awaitable[Sequence[Array]]]
) -> Sequence[Array]:
    """Return arrays that an earlier attempt of this run kept, or make them now and keep them.

    Args:
        kind: class of the content: ``data`` if it holds what rows say.
        key: hash (hex) of everything the arrays depend on.
        blob_store: where they are kept.
        run: lists the blob among its artifacts, and remembers its address in a note in its directory.
        make: computes the arrays.
    """
    note = run.directory / f"{kind}-{key[:16]}.json"
    blob = await run_sync(_noted, note, key)
    if blob is not None and await blob_store.exists(blob.uri):
        arrays: Sequence[Array] = await run_sync(_unpacked, await blob_store.get(blob.uri))
    else:
        arrays = await make()
        blob = await blob_store.put(await run_sync(_packed, arrays), kind=kind, name=f"{kind} {key[:16]}")
        await run_sync(_note_down, note, key, blob)
    run.add_artifact(blob)
    return arrays


def _noted(note: Path, key: str) -> BlobRef | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a note that is torn is one that was not written
        return None
    return BlobRef(**found["blob"]) if found.get("key") == key else None


def _note_down(note: Path, key: str, blob: BlobRef) -> None:
    note.write_text(json.dumps({"key": key, "blob": asdict(blob)}), encoding="utf-8")


def _packed(arrays: Sequence[Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getvalue()


def _unpacked(content: bytes) -> list[Array]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
