"""Port ``blob_store``: immutable bytes under the hash of their content."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from crucible_kitchen.types import BlobRef, JsonObject

__all__ = ["BlobStore"]


@runtime_checkable
class BlobStore(Protocol):
    """Content-addressed storage.

    Guarantees: a blob is whole or absent, whatever crashes (written aside, synced, renamed); the same bytes have the
    same address and are stored once; a hash is verified before bytes are handed out.
    """

    @property
    def synthetic(self) -> bool:
        """See ``Adapter``."""
        ...

    async def put(self, data: bytes, *, kind: str, name: str = "") -> BlobRef:
        """Store bytes.

        Raises:
            StorageFull: the disk is full; nothing was stored and nothing lost.
        """
        ...

    async def put_file(self, path: Path, *, kind: str, name: str = "") -> BlobRef:
        """Store a file's bytes without holding them in memory."""
        ...

    async def put_tree(self, directory: Path, *, kind: str, name: str = "") -> BlobRef:
        """Store a directory: one blob per file and one JSON blob that lists them, whose address is returned."""
        ...

    async def get(self, uri: str) -> bytes:
        """Return a blob's bytes.

        Raises:
            BlobNotFound: there is none.
            IntegrityError: what is stored does not match its address.
        """
        ...

    async def get_tree(self, uri: str, directory: Path) -> None:
        """Write a stored directory into one that does not exist yet."""
        ...

    async def exists(self, uri: str) -> bool:
        """Return whether the blob is there (its hash is not verified)."""
        ...

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        ...

    async def aclose(self) -> None:
        """See ``Adapter``."""
        ...
