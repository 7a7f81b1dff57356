"""The blob store of the local disk: a directory of files named by the sha256 of their content.

It knows no run and no registry, and reads on asyncio only (aiofiles). Layout: ``home/blobs/sha256/ab/<hex>``, with
``home/blobs/tmp`` beside it for what is being written. Read next: ``crucible_kitchen.ports.blob_store``.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import aiofiles
import anyio.from_thread

from crucible_kitchen.errors import BlobNotFound, Conflict, IntegrityError, StorageFull, StoreError
from crucible_kitchen.types import BlobRef, JsonObject
from crucible_kitchen.workers import run_sync

__all__ = ["FilesBlobStore"]

_CHUNK = 1 << 20
_SCHEME = "blob://sha256/"
_ABANDONED_S = 24 * 3600.0
_TREE = "crucible-tree/1"
_HEX = re.compile(r"[0-9a-f]{64}")


class FilesBlobStore:
    """Keeps blobs below ``home/blobs``.

    A blob is written aside, synced to disk and renamed, so that it is whole or absent. What a crash left aside is
    removed a day later.

    Args:
        home: the directory below which it keeps its files.
    """

    def __init__(self, *, home: Path) -> None:
        self._root = Path(home) / "blobs"
        self._swept = False

    @property
    def synthetic(self) -> bool:
        """Never."""
        return False

    async def put(self, data: bytes, *, kind: str, name: str = "") -> BlobRef:
        """Store bytes.

        Raises:
            StorageFull: the disk is full; nothing was stored and nothing lost.
        """
        return await run_sync(self._put, _chunks_of(data), kind, name)

    async def put_file(self, path: Path, *, kind: str, name: str = "") -> BlobRef:
        """Store a file's bytes, a megabyte at a time.

        Raises:
            StorageFull: the disk is full; nothing was stored and nothing lost.
            StoreError: the file cannot be read.
        """
        return await run_sync(self._put_file, Path(path), kind, name or Path(path).name)

    async def put_tree(self, directory: Path, *, kind: str, name: str = "") -> BlobRef:
        """Store a directory: one blob per file and one that lists them, whose address and size are returned.

        Links to files are followed; a link to a directory is refused. Empty directories are not kept.

        Raises:
            StorageFull: the disk is full; nothing of the tree can be seen.
            StoreError: a file cannot be read.
        """
        return await run_sync(self._put_tree, Path(directory), kind, name or Path(directory).name)

    async def get(self, uri: str) -> bytes:
        """Return a blob's bytes.

        Raises:
            BlobNotFound: there is none.
            IntegrityError: what is stored does not match its address.
        """
        sha256, digest, chunks = _address(uri), hashlib.sha256(), []
        try:
            async with aiofiles.open(self._path(sha256), "rb") as file:
                while chunk := await file.read(_CHUNK):
                    await run_sync(digest.update, chunk)
                    chunks.append(chunk)
        except FileNotFoundError:
            raise BlobNotFound(f"there is no blob {uri}") from None
        if digest.hexdigest() != sha256:
            raise _damaged(sha256)
        return b"".join(chunks)

    async def get_tree(self, uri: str, directory: Path) -> None:
        """Write a stored directory into one that does not exist yet; it appears whole or not at all.

        Raises:
            BlobNotFound: the list or one of its files is not there.
            IntegrityError: what is stored is damaged, or a name leads out of the directory.
            Conflict: the directory exists.
        """
        files = _parse_tree(await self.get(uri), uri)
        await run_sync(self._get_tree, files, Path(directory))

    async def exists(self, uri: str) -> bool:
        """Return whether the blob is there (its hash is not verified); what is no address is not."""
        try:
            path = self._path(_address(uri))
        except BlobNotFound:
            return False
        return await run_sync(path.is_file)

    def public_options(self) -> JsonObject:
        """Return no options: where the files are is the machine's business."""
        return {}

    async def aclose(self) -> None:
        """Nothing is held between calls."""

    # --- everything below blocks and runs in worker threads ---

    def _path(self, sha256: str) -> Path:
        return self._root / "sha256" / sha256[:2] / sha256

    def _put_file(self, path: Path, kind: str, name: str) -> BlobRef:
        with _translated(f"the file {path.name} cannot be stored"), path.open("rb") as file:
            return self._put(_chunks(file), kind, name)

    def _put(self, chunks: Iterator[bytes], kind: str, name: str) -> BlobRef:
        with _translated("the blob cannot be stored"), self._aside() as aside:
            digest, size = hashlib.sha256(), 0
            with aside.open("xb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                _sync(file)
            sha256 = digest.hexdigest()
            path = self._path(sha256)
            if not (path.is_file() and _hash(path) == sha256):  # a damaged blob is replaced by a good one
                path.parent.mkdir(parents=True, exist_ok=True)
                aside.replace(path)
                _sync_directory(path.parent)
                _sync_directory(path.parent.parent)
        return BlobRef(_SCHEME + sha256, sha256, size, kind, name)

    @contextmanager
    def _aside(self) -> Iterator[Path]:
        """Give a path to write at; whatever is there at the end is removed."""
        folder = self._root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            self._swept = True
            _sweep(folder)
        path = folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _put_tree(self, directory: Path, kind: str, name: str) -> BlobRef:
        files = []
        with _translated(f"the directory {directory.name} cannot be stored"):
            for relative in _files_below(directory):
                ref = self._put_file(directory / relative, kind, "")
                files.append({"name": relative, "sha256": ref.sha256, "size": ref.size})
        listing = json.dumps({"files": files, "format": _TREE}, separators=(",", ":"), sort_keys=True).encode()
        return self._put(iter((listing,)), kind, name)

    def _get_tree(self, files: list[tuple[str, str]], directory: Path) -> None:
        if directory.exists():
            raise Conflict(f"the directory {directory.name} exists", hint="choose one that does not")
        aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
        with _translated(f"the directory {directory.name} cannot be written"):
            try:
                aside.mkdir(parents=True)
                for relative, sha256 in files:
                    self._copy_out(sha256, aside / relative)
                _sync_directory(aside)
                aside.rename(directory)
                _sync_directory(directory.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def _copy_out(self, sha256: str, target: Path) -> None:
        """Copy a blob to a new file and verify what was copied."""
        source = self._path(sha256)
        if not source.is_file():
            raise BlobNotFound(f"there is no blob {_SCHEME}{sha256}, which the tree lists")
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with source.open("rb") as blob, target.open("xb") as file:
            for chunk in _chunks(blob):
                digest.update(chunk)
                file.write(chunk)
            _sync(file)
        if digest.hexdigest() != sha256:
            raise _damaged(sha256)


def _address(uri: str) -> str:
    sha256 = uri.removeprefix(_SCHEME)
    if not uri.startswith(_SCHEME) or not _HEX.fullmatch(sha256):
        raise BlobNotFound(f"{uri!r} is not the address of a blob", hint=f"an address is {_SCHEME}<64 hex digits>")
    return sha256


def _damaged(sha256: str) -> IntegrityError:
    return IntegrityError(
        f"the blob {_SCHEME}{sha256} is damaged: its bytes do not match its address",
        hint="store the same content again to repair it, or restore it from a backup",
    )


def _parse_tree(data: bytes, uri: str) -> list[tuple[str, str]]:
    """Return a tree's files as (relative path, sha256).

    Raises:
        IntegrityError: it is not a tree, or a name would lead out of the directory.
    """
    try:
        tree = json.loads(data)
        good = tree["format"] == _TREE
        files = [(str(entry["name"]), str(entry["sha256"])) for entry in tree["files"]]
    except (ValueError, KeyError, TypeError):
        good = False
    if not good or not all(_HEX.fullmatch(sha256) for _, sha256 in files):
        raise IntegrityError(f"the blob {uri} is not a stored directory")
    if not all(_is_portable(name) for name, _ in files) or len(dict(files)) != len(files):
        raise IntegrityError(f"the stored directory {uri} names a file twice or outside of itself")
    return files


def _is_portable(name: str) -> bool:
    """Return whether a relative path means the same file below a directory on every system."""
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name
    return inside and not set(name) & set("\\:\0")


def _files_below(directory: Path) -> list[str]:
    """Return the relative paths of all files, sorted, with forward slashes.

    Raises:
        StoreError: something there is no file, or has a name that cannot be restored everywhere.
    """
    found = []
    for folder, directories, names in os.walk(directory, onerror=_raise):
        links = [name for name in directories if (Path(folder) / name).is_symlink()]
        odd = links + [name for name in names if not (Path(folder) / name).is_file()]
        relative = [(Path(folder) / name).relative_to(directory).as_posix() for name in names]
        odd += [name for name in relative if not _is_portable(name)]
        if odd:
            raise StoreError(
                f"{odd[0]!r} in {directory.name} cannot be stored",
                hint="a stored directory holds regular files, without links to directories, backslashes or colons",
            )
        found += relative
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn the system's errors into the store's."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = StorageFull(f"{what}: the disk is full", hint="free some space; what was saved before is untouched")
            raise full from error
        raise StoreError(f"{what}: {error.strerror or type(error).__name__}") from error


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    """Read a file a megabyte at a time; a cancelled caller is heard in between."""
    while chunk := file.read(_CHUNK):
        _check_cancelled()
        yield chunk


def _chunks_of(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(data), _CHUNK):
        _check_cancelled()
        yield bytes(view[start : start + _CHUNK])


def _check_cancelled() -> None:
    """Raise the cancellation of the task that waits for this worker thread, if there is one."""
    check: Callable[[], Any] = anyio.from_thread.check_cancelled
    try:
        check()
    except RuntimeError:  # not in a worker thread: the call runs inline
        return


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make renames in a directory durable; systems that cannot open directories do it by themselves."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what crashed writers left a day ago or longer."""
    for path in folder.iterdir():
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
        except FileNotFoundError:  # another process swept it
            continue
