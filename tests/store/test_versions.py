"""Files of earlier versions open, list and read; a newer file, and one on a disk that refuses, is left as it is."""

import hashlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import Connection

from crucible_kitchen.errors import StorageFull, StoreError
from crucible_kitchen.events import EventRecord, TrainingStep, WarningRaised, WorkflowStart
from crucible_kitchen.store import Owner, RunRecord, SqliteRunStore, StageRecord, schema
from crucible_kitchen.types import BlobRef

pytestmark = pytest.mark.anyio

OLD = Path(__file__).parent / "old"
VERSIONS = sorted(OLD.glob("*.sql"))


def restored(script: Path, path: Path) -> Path:
    """Make a file of an old version from what was dumped of one."""
    with sqlite3.connect(path) as connection:
        connection.executescript(script.read_text(encoding="utf-8"))
    connection.close()
    return path


def fingerprint(path: Path) -> str:
    """Everything in a directory, names and bytes."""
    files = sorted(path.iterdir())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def test_every_version_but_this_one_has_a_file() -> None:
    assert len(VERSIONS) == len(schema.MIGRATIONS) - 1


@pytest.mark.parametrize("script", VERSIONS, ids=lambda path: path.stem)
async def test_a_file_of_an_older_version_opens_lists_and_reads(script: Path, tmp_path: Path) -> None:
    async with SqliteRunStore(restored(script, tmp_path / "runs.db"), clock=lambda: 50.0) as store:
        assert [(r.run_id, r.status) for r in await store.runs()] == [
            ("20261101-120200-cccccc", "running"),
            ("20261101-120100-bbbbbb", "failed"),
            ("20261101-120000-aaaaaa", "completed"),
        ]
        done = await store.run("20261101-120000")
        assert done.config == {"epochs": 1, "model": "tiny"}
        assert done.result == {"metrics": {"training.step.loss": 0.5}}
        assert [type(r.event) for r in await store.read(done.run_id, 0, 9)] == [WorkflowStart, TrainingStep]
        assert await store.manifest(done.run_id) == {"seed": 7}
        assert await store.artifacts(done.run_id) == [BlobRef("blob://sha256/aa", "aa", 3, "weights", "final")]
        (attempt,) = await store.attempts("20261101-120100-bbbbbb")
        assert (attempt.number, attempt.owner, attempt.status) == (1, Owner(), "failed")
        assert (attempt.started_at, attempt.ended_at, attempt.error) == (20.0, 25.0, {"code": "data", "message": "m"})


@pytest.mark.parametrize("script", VERSIONS, ids=lambda path: path.stem)
async def test_a_run_of_an_older_version_can_be_found_crashed_and_go_on(script: Path, tmp_path: Path) -> None:
    async with SqliteRunStore(restored(script, tmp_path / "runs.db"), clock=lambda: 50.0) as store:
        (orphan,) = await store.reconcile()
        assert orphan.status == "crashed"
        lease = await store.open_attempt(orphan.run_id)
        assert (lease.epoch, lease.seq) == (2, 1)
        store.append([EventRecord(orphan.run_id, 2, 1.0, WarningRaised(code="c", message="m"))])
        store.record(StageRecord(orphan.run_id, "w/a", "in", "out", 1, 2))
        await store.finish_run(orphan.run_id, "completed", {})
        assert [a.status for a in await store.attempts(orphan.run_id)] == ["crashed", "completed"]
        assert (await store.open_attempt("20261101-120100-bbbbbb")).epoch == 2


async def test_a_migration_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = restored(VERSIONS[0], tmp_path / "runs.db")
    first, second = schema.MIGRATIONS

    def broken(connection: Connection) -> None:
        second(connection)
        raise StoreError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (first, broken))
        with pytest.raises(StoreError, match="power"):
            await SqliteRunStore(path).open()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'attempts'").fetchall() == []
    connection.close()
    async with SqliteRunStore(path) as store:
        assert len(await store.runs()) == 3


async def test_a_file_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord("r", "w"))
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={len(schema.MIGRATIONS) + 1}")
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    before = fingerprint(tmp_path)
    with pytest.raises(StoreError, match="schema version") as caught:
        await SqliteRunStore(path).open()
    assert "upgrade" in str(caught.value.hint)
    assert fingerprint(tmp_path) == before


async def test_opening_a_file_that_is_up_to_date_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord("r", "w"))
        await store.finish_run("r", "completed", {})
    before = fingerprint(tmp_path)
    with sqlite3.connect(path) as busy:
        busy.execute("BEGIN IMMEDIATE")  # another process writes all the time: looking does not wait for it
        async with SqliteRunStore(path) as store:
            assert len(await store.runs()) == 1
            assert await store.reconcile() == []
        busy.execute("ROLLBACK")
    busy.close()
    assert fingerprint(tmp_path) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    options = ["-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)


async def test_a_disk_that_is_read_only_gives_one_clear_error(disk: Path) -> None:
    path = disk / "runs.db"
    remount(disk, "ro")
    with pytest.raises(StoreError, match="read-only"):
        await SqliteRunStore(path).open()
    remount(disk, "rw")
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord("r", "w"))
    before = fingerprint(disk)
    remount(disk, "ro")
    with pytest.raises(StoreError, match="read-only") as caught:
        async with SqliteRunStore(path) as store:
            await store.create_run(RunRecord("s", "w"))
    assert not isinstance(caught.value, StorageFull)
    assert caught.value.hint is not None
    remount(disk, "rw")
    assert fingerprint(disk) == before
    async with SqliteRunStore(path) as store:
        assert [run.run_id for run in await store.runs()] == ["r"]


async def test_a_disk_that_fills_up_keeps_what_was_promised_and_goes_on_when_it_has_room(disk: Path) -> None:
    path, filler = disk / "runs.db", disk / "filler"
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord("r", "w"))
        seq = 0
        filler.write_bytes(bytes(100_000))

        async def fill() -> None:
            nonlocal seq
            while seq < 1000:
                seq += 1
                store.append([EventRecord("r", seq, 1.0, WarningRaised(code="c", message="m" * 2000))])
                await store.flush("r", seq)

        with pytest.raises(StorageFull) as caught:
            await fill()
        assert "disk is full" in caught.value.message
        promised = store.durable("r")
        assert promised > 50
        with pytest.raises(StorageFull):
            await store.finish_run("r", "failed", {})
    filler.unlink()
    async with SqliteRunStore(path, clock=lambda: 1e12) as store:
        assert len(await store.read("r", 0, 1000)) == promised
        assert (await store.open_attempt("r")).seq == promised
        await store.finish_run("r", "completed", {})


async def test_a_disk_without_any_room_gives_one_clear_error(disk: Path) -> None:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(StorageFull):
        await SqliteRunStore(disk / "runs.db").open()
    filler.unlink()
    async with SqliteRunStore(disk / "runs.db") as store:
        await store.create_run(RunRecord("r", "w"))
