"""What only the SQLite store does: survive death, refuse a newer file, stop at a failed write."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from crucible_kitchen.errors import StorageFull, StoreError
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import RunRecord, SqliteRunStore
from crucible_kitchen.store import sqlite as module

pytestmark = pytest.mark.anyio


def record(run_id: str, seq: int, size: int = 10) -> EventRecord:
    return EventRecord(run_id, seq, 1.0, WarningRaised(code="c", message="m" * size))


async def test_a_store_is_found_again_when_it_is_opened_again(tmp_path: Path) -> None:
    async with SqliteRunStore(tmp_path / "runs.db") as store:
        await store.create_run(RunRecord("r", "w", config={"a": 1}))
        store.append([record("r", 1)])
    async with SqliteRunStore(tmp_path / "runs.db") as store:
        assert (await store.run("r")).config == {"a": 1}
        assert await store.read("r", 0, 5) == [record("r", 1)]


async def test_two_stores_on_one_file_see_each_other(tmp_path: Path) -> None:
    async with SqliteRunStore(tmp_path / "runs.db") as one, SqliteRunStore(tmp_path / "runs.db") as two:
        await one.create_run(RunRecord("a", "w"))
        await two.create_run(RunRecord("b", "w"))
        one.append([record("a", 1)])
        two.append([record("b", 1)])
        await one.flush("a", 1)
        await two.flush("b", 1)
        assert await two.read("a", 0, 5) == [record("a", 1)]
        assert {r.run_id for r in await one.runs()} == {"a", "b"}


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    async with SqliteRunStore(tmp_path / "runs.db"):
        pass
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match="version 99") as caught:
        await SqliteRunStore(tmp_path / "runs.db").open()
    assert caught.value.hint is not None
    connection.close()


async def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes(b"not a database, but long enough to be read as one " * 40)
    with pytest.raises(StoreError, match="not a run store"):
        await SqliteRunStore(path).open()


async def test_a_full_disk_stops_the_run_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = module._connect

    def small(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA max_page_count=60").close()
        return connection

    monkeypatch.setattr(module, "_connect", small)
    async with SqliteRunStore(tmp_path / "runs.db") as store:
        await store.create_run(RunRecord("r", "w"))
        seq = 0

        async def fill() -> None:
            nonlocal seq
            while seq < 1000:
                seq += 1
                store.append([record("r", seq, 2000)])
                await store.flush("r", seq)

        with pytest.raises(StorageFull):
            await fill()
        durable = store.durable("r")
        assert 0 < durable < seq
        with pytest.raises(StorageFull):
            store.append([record("r", seq + 1)])
        with pytest.raises(StorageFull):
            await store.flush("r", seq)
        with pytest.raises(StorageFull):
            await store.durable_after("r", seq)
        with pytest.raises(StorageFull):
            await store.finish_run("r", "failed", {})
        assert len(await store.read("r", 0, 1000)) == durable


async def test_a_producer_that_is_too_fast_waits_for_the_writer(tmp_path: Path) -> None:
    async with SqliteRunStore(tmp_path / "runs.db", limit=10) as store:
        await store.create_run(RunRecord("r", "w"))
        store.append([record("r", seq) for seq in range(1, 2001)])
        assert store.pending == 2000
        await store.drain()
        assert store.pending <= 10


async def test_closing_leaves_no_thread(tmp_path: Path) -> None:
    async with SqliteRunStore(tmp_path / "runs.db") as store:
        await store.runs()
        assert any(thread.name.startswith("crucible-run-store") for thread in threading.enumerate())
    assert not any(thread.name.startswith("crucible-run-store") for thread in threading.enumerate())


KILLED = """
import sys, anyio
from pathlib import Path
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import RunRecord, SqliteRunStore

async def main():
    async with SqliteRunStore(Path(sys.argv[1])) as store:
        await store.create_run(RunRecord("r", "w"))
        for seq in range(1, 1_000_000):
            store.append([EventRecord("r", seq, 1.0, WarningRaised(code="c", message="m"))])
            await store.flush("r", seq)
            print(seq, flush=True)

anyio.run(main)
"""


async def test_what_was_durable_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    promised = await anyio.to_thread.run_sync(_promises_before_the_kill, path)
    async with SqliteRunStore(path) as store:
        kept = [r.seq for r in await store.read("r", 0, 1_000_000)]
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) >= promised >= 50


def _promises_before_the_kill(path: Path) -> int:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 50:
                os.kill(child.pid, signal.SIGKILL)
                break
        return max([50, *(int(rest) for rest in child.stdout.read().split("\n")[:-1] if rest)])


async def test_processes_that_start_together_share_one_new_store(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    async with anyio.create_task_group() as group:
        for i in range(6):
            group.start_soon(_create_in_own_store, path, f"r{i}")
    async with SqliteRunStore(path) as store:
        assert {r.run_id for r in await store.runs()} == {f"r{i}" for i in range(6)}


async def _create_in_own_store(path: Path, run_id: str) -> None:
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord(run_id, "w"))
