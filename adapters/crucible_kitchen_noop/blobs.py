"""A blob store in memory, complete: trees, verification, one copy per content.

It forgets everything with its process. Read next: ``crucible_kitchen.ports.blob_store``.
"""

import hashlib
import json
import shutil
from pathlib import Path

import anyio.lowlevel

from crucible_kitchen.errors import BlobNotFound, Conflict, IntegrityError
from crucible_kitchen.types import BlobRef, JsonObject
from crucible_kitchen.workers import run_sync
from crucible_kitchen_noop.files import storing

__all__ = ["NoopBlobStore"]

_SCHEME = "blob://sha256/"


class NoopBlobStore:
    """Keeps blobs in a dict by their hash."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    @property
    def synthetic(self) -> bool:
        """Always: it is gone with the process."""
        return True

    async def put(self, data: bytes, *, kind: str, name: str = "") -> BlobRef:
        """See ``BlobStore``."""
        await anyio.lowlevel.checkpoint()
        digest = hashlib.sha256(data).hexdigest()
        self._blobs.setdefault(digest, bytes(data))
        return BlobRef(_SCHEME + digest, digest, len(data), kind, name)

    async def put_file(self, path: Path, *, kind: str, name: str = "") -> BlobRef:
        """Store a file's bytes; this store's place is memory."""
        return await self.put(await run_sync(_read, path), kind=kind, name=name)

    async def put_tree(self, directory: Path, *, kind: str, name: str = "") -> BlobRef:
        """See ``BlobStore``."""
        files = []
        for relative, data in (await run_sync(_read_tree, directory)).items():
            ref = await self.put(data, kind=kind, name=relative)
            files.append({"path": relative, "sha256": ref.sha256, "size": ref.size})
        return await self.put(json.dumps({"files": files}, sort_keys=True).encode(), kind=kind, name=name)

    async def get(self, uri: str) -> bytes:
        """See ``BlobStore``."""
        await anyio.lowlevel.checkpoint()
        digest = uri.removeprefix(_SCHEME)
        data = self._blobs.get(digest)
        if data is None or not uri.startswith(_SCHEME):
            raise BlobNotFound(f"there is no blob {uri}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(f"the blob {uri} does not match its address")
        return data

    async def get_tree(self, uri: str, directory: Path) -> None:
        """See ``BlobStore``."""
        try:
            files = {entry["path"]: entry["sha256"] for entry in json.loads(await self.get(uri))["files"]}
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"the blob {uri} does not list a directory") from error
        contents = {path: await self.get(_SCHEME + digest) for path, digest in files.items()}
        await run_sync(_write_tree, directory, contents)

    async def exists(self, uri: str) -> bool:
        """See ``BlobStore``."""
        await anyio.lowlevel.checkpoint()
        return uri.startswith(_SCHEME) and uri.removeprefix(_SCHEME) in self._blobs

    def public_options(self) -> JsonObject:
        """There are no options."""
        return {}

    async def aclose(self) -> None:
        """Nothing is held."""


def _read(path: Path) -> bytes:
    with storing("a blob"):
        return path.read_bytes()


def _read_tree(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _read(path) for path in paths}


def _write_tree(directory: Path, contents: dict[str, bytes]) -> None:
    """Write the files aside and rename the directory, so that it is whole or absent."""
    if directory.exists():
        raise Conflict(f"the directory {directory.name!r} exists already", hint="name one that does not")
    aside = directory.with_name(directory.name + ".part")
    paths = {aside / relative: data for relative, data in contents.items()}
    if not all(path.resolve().is_relative_to(aside.resolve()) for path in paths):
        raise IntegrityError("a stored path leaves its directory")
    with storing("a stored directory"):
        try:
            aside.mkdir(parents=True)
            for path, data in paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            aside.rename(directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
