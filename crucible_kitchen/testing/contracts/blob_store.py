"""The contract of port ``blob_store``: whole, verified, addressed by content.

Knows no adapter. Read next: ``crucible_kitchen.ports.blob_store``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio

from crucible_kitchen.errors import BlobNotFound, CrucibleError, IntegrityError
from crucible_kitchen.ports import BlobStore
from crucible_kitchen.testing.contracts.base import Suite, refuses, skip
from crucible_kitchen.types import BlobRef

__all__ = ["BLOB_STORE", "BlobStoreCase"]


@dataclass(frozen=True)
class BlobStoreCase:
    """A blob store under test.

    Attributes:
        store: the adapter.
        directory: an empty directory of the test's own.
        tamper: changes the stored bytes behind the store's back, where that is possible.
    """

    store: BlobStore
    directory: Path
    tamper: Callable[[BlobRef], None] | None = None

    @property
    def adapter(self) -> BlobStore:
        """The store."""
        return self.store


BLOB_STORE: Suite[BlobStoreCase] = Suite("blob_store")


def _files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def _tree(directory: Path) -> Path:
    tree = directory / "tree"
    (tree / "deeper" / "still").mkdir(parents=True)
    (tree / "weights.bin").write_bytes(bytes(range(256)) * 9)
    (tree / "deeper" / "config.json").write_text("{}")
    (tree / "deeper" / "still" / "again.json").write_text("{}")
    (tree / "empty").write_bytes(b"")
    return tree


@BLOB_STORE
async def what_is_put_can_be_got(case: BlobStoreCase) -> None:
    """A round trip, also of no bytes at all."""
    for data in (b"", b"one", bytes(range(256)) * 5000):
        ref = await case.store.put(data, kind="report", name="a name")
        assert await case.store.get(ref.uri) == data, "other bytes came back"


@BLOB_STORE
async def an_address_is_the_hash_of_the_content(case: BlobStoreCase) -> None:
    """``blob://sha256/<hex>``, with size, kind and name as given."""
    ref = await case.store.put(b"content", kind="report", name="r.md")
    digest = hashlib.sha256(b"content").hexdigest()
    assert (ref.uri, ref.sha256, ref.size) == (f"blob://sha256/{digest}", digest, 7), f"address {ref}"
    assert (ref.kind, ref.name) == ("report", "r.md"), f"labels {ref}"


@BLOB_STORE
async def the_same_bytes_have_the_same_address(case: BlobStoreCase) -> None:
    """Whatever their name, and also when stored at the same time; other bytes have another address."""
    refs: list[BlobRef] = []

    async def put(number: int) -> None:
        refs.append(await case.store.put(b"same", kind="report", name=f"n{number}"))

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(put, number)
    assert len({ref.uri for ref in refs}) == 1, "equal bytes got several addresses"
    assert (await case.store.put(b"Same", kind="report")).uri != refs[0].uri, "other bytes got the same address"
    assert await case.store.get(refs[0].uri) == b"same", "storing twice changed the bytes"


@BLOB_STORE
async def a_file_has_the_address_of_its_bytes(case: BlobStoreCase) -> None:
    """``put_file`` equals ``put`` and leaves the file as it was."""
    path = case.directory / "file.bin"
    path.write_bytes(b"x" * 3_000_000)
    ref = await case.store.put_file(path, kind="weights", name="w")
    assert ref.uri == (await case.store.put(path.read_bytes(), kind="weights")).uri, "another address than its bytes"
    assert ref.size == 3_000_000, "size or source is wrong"
    assert path.exists(), "size or source is wrong"


@BLOB_STORE
async def a_directory_comes_back_as_it_was(case: BlobStoreCase) -> None:
    """``put_tree`` and ``get_tree`` are a round trip, with nested and empty files."""
    tree = _tree(case.directory)
    ref = await case.store.put_tree(tree, kind="weights", name="model")
    await case.store.get_tree(ref.uri, case.directory / "copy")
    assert _files(case.directory / "copy") == _files(tree), "the directory came back changed"
    assert (await case.store.put_tree(case.directory / "copy", kind="weights")).uri == ref.uri, "not the same address"


@BLOB_STORE
async def a_directory_that_exists_is_not_written_into(case: BlobStoreCase) -> None:
    """``get_tree`` refuses and leaves what is there."""
    ref = await case.store.put_tree(_tree(case.directory), kind="weights")
    there = case.directory / "there"
    there.mkdir()
    (there / "mine").write_text("mine")
    with refuses(CrucibleError, what="writing into a directory that exists"):
        await case.store.get_tree(ref.uri, there)
    assert _files(there) == {"mine": b"mine"}, "the directory was changed"


@BLOB_STORE
async def what_is_not_there_is_not_found(case: BlobStoreCase) -> None:
    """``get`` and ``get_tree`` raise, ``exists`` says no, also for what is no address."""
    absent = "blob://sha256/" + "0" * 64
    for uri in (absent, "blob://sha256/../../etc/passwd", "file:///etc/passwd", ""):
        assert not await case.store.exists(uri), f"{uri!r} exists"
        with refuses(BlobNotFound, what=f"getting {uri!r}"):
            await case.store.get(uri)
    with refuses(BlobNotFound, what="getting an absent tree"):
        await case.store.get_tree(absent, case.directory / "no")
    assert not (case.directory / "no").exists(), "a failed get_tree left a directory"


@BLOB_STORE
async def what_was_put_exists(case: BlobStoreCase) -> None:
    """``exists`` says yes after ``put``."""
    ref = await case.store.put(b"here", kind="report")
    assert await case.store.exists(ref.uri), "a stored blob does not exist"


@BLOB_STORE
async def changed_bytes_are_never_handed_out(case: BlobStoreCase) -> None:
    """A hash is verified before bytes are handed out, one by one and in trees."""
    if case.tamper is None:
        skip("the stored bytes cannot be changed from outside")
    ref = await case.store.put(b"original", kind="report")
    case.tamper(ref)
    with refuses(IntegrityError, what="getting changed bytes"):
        await case.store.get(ref.uri)
    tree = await case.store.put_tree(_tree(case.directory), kind="weights")
    case.tamper(await case.store.put(b"{}", kind="weights"))
    with refuses(IntegrityError, what="getting a tree with a changed file"):
        await case.store.get_tree(tree.uri, case.directory / "copy")
    assert not (case.directory / "copy").exists(), "a failed get_tree left a directory"
