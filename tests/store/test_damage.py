"""Torn, cut and damaged files: a store opens at a state that was committed, or says that it is damaged."""

import random
import sqlite3
from pathlib import Path

import pytest

from crucible_kitchen.errors import IntegrityError, StoreError
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import Checkpoint, RunRecord, SqliteRunStore, StageRecord

pytestmark = pytest.mark.anyio

State = tuple[int, int, int, str]
"""How many events, stages' records and checkpoints there are, and the run's status."""

FRAME = 2048 + 24  # a page and its header in SQLite's write-ahead log, whose own header has 32 bytes


async def state(store: SqliteRunStore) -> State:
    if not await store.runs():
        return (0, 0, 0, "none")
    events = [record.seq for record in await store.read("r", 0, 10_000)]
    assert events == list(range(1, len(events) + 1))
    saved = await store.checkpoints("r")
    assert not any(checkpoint.damaged for checkpoint in saved)
    return (len(events), len(await store.records("r")), len(saved), (await store.run("r")).status)


def files(path: Path) -> tuple[bytes, bytes]:
    log = Path(f"{path}-wal")
    return path.read_bytes(), log.read_bytes() if log.exists() else b""


def placed(path: Path, file: bytes, log: bytes = b"") -> None:
    """Put a file and its log where nothing else is."""
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.iterdir():
        old.unlink()
    path.write_bytes(file)
    if log:
        Path(f"{path}-wal").write_bytes(log)


async def written(path: Path) -> tuple[bytes, bytes, list[State]]:
    """Write a run, and return the file and its log as a kill would leave them, and every state that was committed."""
    states: list[State] = [(0, 0, 0, "none")]
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord("r", "w"))
        states.append(await state(store))
        for seq in range(1, 31):
            store.append([EventRecord("r", seq, 0.0, WarningRaised(code="c", message="m" * 100 * seq))])
            store.record(StageRecord("r", f"w/{seq}", "in", "out", "v" * 90 * seq, seq))
            await store.flush("r", seq)
            states.append(await state(store))
            if seq % 10 == 0:
                data = {"folded": "s" * 3000}
                await store.put_checkpoint(Checkpoint("r", seq // 10, "w/s", "w/s", seq, 1, seq, 0.0, data))
                states.append(await state(store))
        await store.finish_run("r", "completed", {})
        states.append(await state(store))
        return *files(path), states


async def opened(path: Path) -> State | StoreError:
    try:
        async with SqliteRunStore(path) as store:
            found = await state(store)
            if found[3] == "none":
                await store.create_run(RunRecord("r", "w"))
            return found
    except StoreError as error:
        return error


def places(size: int, count: int) -> list[int]:
    """Places to cut at, in order: around the frames' edges, and anywhere."""
    chance = random.Random(size)
    edges = [
        32 + FRAME * chance.randrange(size // FRAME) + off for off in (-1, 0, 1, 23, 24) for _ in range(count // 10)
    ]
    anywhere = [chance.randrange(size) for _ in range(count // 2)]
    return sorted({0, size, *anywhere, *(edge for edge in edges if 0 <= edge <= size)})


async def cut_logs(tmp_path: Path, count: int, *, garbage: bool) -> None:
    file, log, states = await written(tmp_path / "runs.db")
    assert len(set(states)) == len(states)
    noise = random.Random(0).randbytes(len(log))
    last, path = 0, tmp_path / "cut" / "runs.db"
    for place in places(len(log), count):
        placed(path, file, log[:place] + (noise[place:] if garbage else b""))
        found = await opened(path)
        assert not isinstance(found, StoreError), f"cut at {place}"
        assert found in states, f"cut at {place}"
        assert states.index(found) >= last, f"cut at {place}"
        last = states.index(found)
    assert last == len(states) - 1


@pytest.mark.parametrize("garbage", [False, True], ids=["cut", "torn"])
async def test_a_log_that_is_cut_anywhere_opens_at_the_last_whole_commit(tmp_path: Path, garbage: bool) -> None:
    await cut_logs(tmp_path, 80, garbage=garbage)


@pytest.mark.e2e
@pytest.mark.parametrize("garbage", [False, True], ids=["cut", "torn"])
async def test_a_log_that_is_cut_at_hundreds_of_places_opens_at_a_whole_commit(tmp_path: Path, garbage: bool) -> None:
    await cut_logs(tmp_path, 600, garbage=garbage)


async def test_a_file_that_is_cut_says_that_it_is_damaged(tmp_path: Path) -> None:
    await written(tmp_path / "runs.db")
    whole, log = files(tmp_path / "runs.db")
    assert log == b""
    path = tmp_path / "cut" / "runs.db"
    for place in [*range(1, 600, 7), *places(len(whole), 60)[1:]]:
        placed(path, whole[:place])
        found = await opened(path)
        if isinstance(found, StoreError):
            assert "damaged" in found.message, f"cut at {place}"
            assert found.hint is not None
            assert files(path) == (whole[:place], b""), f"cut at {place}: what was left is not left alone"
        else:
            assert found == (30, 30, 3, "completed"), f"cut at {place}"
    assert not isinstance(found, StoreError)


async def test_a_log_whose_file_is_gone_is_left_alone(tmp_path: Path) -> None:
    _, log, _ = await written(tmp_path / "runs.db")
    path = tmp_path / "cut" / "runs.db"
    placed(path, b"", log)
    found = await opened(path)
    assert isinstance(found, StoreError)
    assert "damaged" in found.message
    assert files(path) == (b"", log)


async def test_a_damaged_checkpoint_is_told_and_the_one_before_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord("r", "w"))
        for number in (1, 2, 3, 4, 5):
            data = {"step": number, "loss": 0.1}
            await store.put_checkpoint(Checkpoint("r", number, "w/s", "w/s", number, 1, 0, 0.0, data, {"resume": "x"}))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE checkpoints SET data = replace(data, '5', '6') WHERE number = 5")
        connection.execute("UPDATE checkpoints SET data = substr(data, 1, 9) WHERE number = 4")
        connection.execute("UPDATE checkpoints SET step = 7 WHERE number = 3")
        connection.execute("UPDATE checkpoints SET states = '[' WHERE number = 2")
    connection.close()
    async with SqliteRunStore(path) as store:
        saved = await store.checkpoints("r")
        assert [(c.number, c.damaged) for c in saved] == [(5, True), (4, True), (3, True), (2, True), (1, False)]
        with pytest.raises(IntegrityError, match="checkpoint 5"):
            saved[0].verify()
        saved[-1].verify()
        assert saved[-1].data == {"step": 1, "loss": 0.1}
