"""The local blob store: the port's contract, full disks, crashes, hostile trees."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import anyio
import anyio.from_thread
import pytest

from crucible_kitchen.errors import BlobNotFound, Conflict, IntegrityError, StorageFull, StoreError
from crucible_kitchen.ports import BlobStore
from crucible_kitchen.testing import contracts
from crucible_kitchen.workers import inline
from crucible_kitchen_files import FilesBlobStore
from crucible_kitchen_files import blobs as implementation

pytestmark = pytest.mark.anyio


@pytest.fixture
def store(home: Path) -> FilesBlobStore:
    return FilesBlobStore(home=home)


def stored(home: Path) -> list[str]:
    """Return what lies in the store, half-written things included."""
    return sorted(path.name for path in (home / "blobs").rglob("*") if path.is_file())


def place(home: Path, sha256: str) -> Path:
    return home / "blobs" / "sha256" / sha256[:2] / sha256


@pytest.mark.parametrize("check", contracts.BLOB_STORE, ids=contracts.name)
async def test_the_contract_of_the_port_is_kept(check, store, home, tmp_path):
    def tamper(ref):
        place(home, ref.sha256).write_bytes(b"something else")

    directory = tmp_path / "directory"
    directory.mkdir()
    await check(contracts.BlobStoreCase(store, directory, tamper))


async def test_it_is_a_blob_store_and_does_nothing_before_it_is_asked(store, home):
    assert isinstance(store, BlobStore)
    assert not list(home.iterdir())


async def test_a_blob_lies_under_its_hash_once_and_nothing_is_left_beside_it(store, home):
    ref = await store.put(b"same", kind="data")
    (home / "file").write_bytes(b"same")
    assert (await store.put_file(home / "file", kind="weights")).uri == ref.uri
    assert stored(home) == [hashlib.sha256(b"same").hexdigest()]
    assert place(home, ref.sha256).read_bytes() == b"same"


async def test_putting_the_same_content_again_repairs_a_damaged_blob(store, home):
    ref = await store.put(b"good", kind="data")
    place(home, ref.sha256).write_bytes(b"baad")
    with pytest.raises(IntegrityError):
        await store.get(ref.uri)
    await store.put(b"good", kind="data")
    assert await store.get(ref.uri) == b"good"


async def test_putting_what_is_there_does_not_write_it_again(store, home):
    ref = await store.put(b"good", kind="data")
    before = os.stat(place(home, ref.sha256)).st_ino
    await store.put(b"good", kind="data")
    assert os.stat(place(home, ref.sha256)).st_ino == before


FULL_DISK = """
import anyio, pathlib, subprocess, sys
from crucible_kitchen.errors import StorageFull
from crucible_kitchen_files import FilesBlobStore

home = pathlib.Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(home)]).returncode:
    sys.exit(77)

async def main():
    store = FilesBlobStore(home=home)
    kept = await store.put(b"k" * 500_000, kind="data")
    big = home.parent / "big"
    big.mkdir()
    (big / "a").write_bytes(b"a" * 300_000)
    (big / "b").write_bytes(b"b" * 3_000_000)
    for attempt in (
        lambda: store.put(b"x" * 3_000_000, kind="data"),
        lambda: store.put_file(big / "b", kind="data"),
        lambda: store.put_tree(big, kind="data"),
    ):
        try:
            await attempt()
        except StorageFull as error:
            assert "untouched" in error.hint
        else:
            raise AssertionError("no StorageFull")
    assert await store.get(kept.uri) == b"k" * 500_000
    assert not list((home / "blobs" / "tmp").iterdir()), "a part was left"
    again = await store.put(b"small", kind="data")
    assert await store.get(again.uri) == b"small"

anyio.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a full disk is made with a small tmpfs")
async def test_a_full_disk_stores_nothing_loses_nothing_and_says_so(home, tmp_path):
    # A disk of 2 MB of the test's own, in a mount namespace that ends with the process.
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK, str(home)]
    done = await anyio.run_process(command, check=False)
    if done.returncode == 77 or b"unshare" in done.stderr:
        pytest.skip("the kernel gives no mount namespace here")
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_a_sync_that_finds_the_disk_or_quota_full_stores_nothing(store, home, monkeypatch, code):
    # A quota cannot be set without root: the lowest call is made to fail as the kernel would.
    await store.put(b"before", kind="data")
    before = stored(home)

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(implementation.os, "fsync", full)
    with pytest.raises(StorageFull):
        await store.put(b"after", kind="data")
    assert stored(home) == before


CRASH = """
import anyio, os, pathlib, sys
from crucible_kitchen_files import FilesBlobStore, blobs

def crash(*_):
    print("at it", flush=True)
    os.kill(os.getpid(), 9)

setattr(blobs.os, sys.argv[2], crash) if sys.argv[2] == "fsync" else setattr(blobs.Path, sys.argv[2], crash)
anyio.run(lambda: FilesBlobStore(home=pathlib.Path(sys.argv[1])).put(b"x" * 3_000_000, kind="data"))
"""


@pytest.mark.parametrize("where", ["fsync", "replace"])
async def test_a_write_that_is_killed_leaves_no_blob_and_what_it_left_goes_after_a_day(home, where):
    done = await anyio.run_process([sys.executable, "-c", CRASH, str(home), where], check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b"at it\n"
    left = list((home / "blobs" / "tmp").iterdir())
    assert len(left) == 1
    assert not list((home / "blobs").glob("sha256/*/*"))
    await FilesBlobStore(home=home).put(b"young things stay", kind="data")
    assert left[0].exists()
    os.utime(left[0], (0, time.time() - 2 * 24 * 3600))
    ref = await FilesBlobStore(home=home).put(b"x" * 3_000_000, kind="data")
    assert not left[0].exists()
    assert len(await FilesBlobStore(home=home).get(ref.uri)) == 3_000_000


async def test_a_cancelled_write_leaves_nothing(store, home, monkeypatch):
    reached, cancelled = anyio.Event(), threading.Event()
    chunks = 0
    real = implementation._check_cancelled

    def slow() -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 2:
            anyio.from_thread.run_sync(reached.set)
            assert cancelled.wait(10)
        real()

    monkeypatch.setattr(implementation, "_check_cancelled", slow)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: store.put(b"x" * 20_000_000, kind="data"))
            await reached.wait()
            group.cancel_scope.cancel()
            cancelled.set()
    assert chunks == 2
    assert stored(home) == []


async def test_many_writers_of_the_same_content_store_it_once(store, home):
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(lambda: store.put(b"y" * 100_000, kind="data"))
    assert len(stored(home)) == 1


async def test_a_directory_comes_back_as_it_was_with_links_to_files_followed(store, home, tmp_path):
    source = tmp_path / "model"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "weights.bin").write_bytes(b"w" * 3_000_000)
    (source / "deep" / "er" / "ümläut.txt").write_text("u")
    (source / "empty").write_bytes(b"")
    (source / "link").symlink_to(source / "weights.bin")
    ref = await store.put_tree(source, kind="weights")
    assert (ref.name, ref.kind) == ("model", "weights")
    listing = await store.get(ref.uri)
    assert ref.size == len(listing)
    assert [f["name"] for f in json.loads(listing)["files"]] == ["deep/er/ümläut.txt", "empty", "link", "weights.bin"]
    target = tmp_path / "copies" / "model"
    await store.get_tree(ref.uri, target)
    assert (target / "link").read_bytes() == (target / "weights.bin").read_bytes() == b"w" * 3_000_000
    assert (target / "deep" / "er" / "ümläut.txt").read_text() == "u"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    with pytest.raises(Conflict):
        await store.get_tree(ref.uri, target)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "", ".", "a//b", "./a", "a\\..\\x", "C:x", "a/../b", "x\0y", "a/"]
)
async def test_a_tree_that_leads_out_of_its_directory_is_refused(store, tmp_path, name):
    blob = await store.put(b"bad", kind="data")
    listing = {"format": "crucible-tree/1", "files": [{"name": name, "sha256": blob.sha256, "size": 3}]}
    tree = await store.put(json.dumps(listing).encode(), kind="weights")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(IntegrityError):
        await store.get_tree(tree.uri, tmp_path / "out" / "tree")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        b"no json",
        b"[]",
        b"3",
        b'{"format": "crucible-tree/2", "files": []}',
        b'{"format": "crucible-tree/1"}',
        b'{"format": "crucible-tree/1", "files": [{"name": "a", "sha256": "../../x"}]}',
    ],
)
async def test_a_blob_that_is_no_directory_is_not_unpacked(store, tmp_path, content):
    ref = await store.put(content, kind="data")
    with pytest.raises(IntegrityError, match="not a stored directory"):
        await store.get_tree(ref.uri, tmp_path / "out")
    assert not (tmp_path / "out").exists()


async def test_a_tree_whose_file_is_gone_is_not_found_and_leaves_nothing(store, home, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("a")
    (source / "b").write_text("b")
    ref = await store.put_tree(source, kind="data")
    place(home, hashlib.sha256(b"b").hexdigest()).unlink()
    with pytest.raises(BlobNotFound):
        await store.get_tree(ref.uri, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*out*"))


async def test_what_cannot_be_restored_is_not_stored(store, tmp_path):
    source = tmp_path / "source"
    (source / "real").mkdir(parents=True)
    (source / "link").symlink_to(source / "real")
    with pytest.raises(StoreError, match="'link' in source cannot be stored"):
        await store.put_tree(source, kind="data")
    (source / "link").unlink()
    (source / "a:b").write_text("x")
    with pytest.raises(StoreError, match="'a:b'"):
        await store.put_tree(source, kind="data")
    os.unlink(source / "a:b")
    os.mkfifo(source / "pipe")
    with pytest.raises(StoreError, match="'pipe'"):
        await store.put_tree(source, kind="data")


async def test_missing_files_and_directories_are_store_errors(store, tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        await store.put_file(tmp_path / "no", kind="data")
    with pytest.raises(StoreError, match="No such file"):
        await store.put_tree(tmp_path / "no", kind="data")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_writes_inline_under_a_virtual_clock(home, backend):
    async def main():
        with inline():
            store = FilesBlobStore(home=home)
            ref = await store.put(b"z" * 3_000_000, kind="data")
            assert await store.exists(ref.uri)

    anyio.run(main, backend=backend)


def test_importing_and_constructing_the_adapters_loads_no_optional_package():
    code = (
        "import sys; from crucible_kitchen_files import *; from crucible_kitchen_huggingface import *;"
        "FilesDatasetStore(); HuggingFaceDatasetStore();"
        "print([m for m in ('pyarrow', 'datasets', 'pandas', 'reasoning_gym', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
