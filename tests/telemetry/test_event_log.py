"""The event log: order, durability before visibility, and subscribers that come, stall, drop and come again."""

import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_kitchen.errors import StoreError
from crucible_kitchen.events import EventRecord, WarningRaised, WorkflowStop
from crucible_kitchen.store import Lease, MemoryRunStore, RunRecord, SqliteRunStore
from crucible_kitchen.store.front import Committed, Entry, JournalFront
from crucible_kitchen.telemetry import EventLog
from crucible_kitchen.testing.clock import virtual_clock

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    return virtual_clock()


def news(message: object) -> WarningRaised:
    return WarningRaised(code="c", message=str(message))


def end() -> WorkflowStop:
    return WorkflowStop(recipe="w", status="completed", duration_s=1.0)


@pytest.fixture
async def store() -> AsyncIterator[MemoryRunStore]:
    async with MemoryRunStore() as store:
        await store.create_run(RunRecord("r", "w"))
        yield store


class Withheld(JournalFront):
    """A journal whose disk is as slow as the test says."""

    def __init__(self) -> None:
        super().__init__(limit=10)
        self.records: list[EventRecord] = []
        self._ready()
        self._opened(Lease("r", 1, 0.0, 0))

    def _enqueue(self, entry: Entry) -> None:
        record = entry[1]
        assert isinstance(record, EventRecord)
        self.records.append(record)

    def _hurry(self) -> None:
        return

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        return self.records[after : min(after + limit, self.durable(run_id))]

    def write(self, seq: int) -> None:
        self._committed(Committed(seq - self.durable("r"), {"r": (seq, 0)}))

    def breaks(self) -> None:
        self._fail(StoreError("the disk broke"))


async def test_places_count_from_one_and_times_come_from_the_clock(store: MemoryRunStore) -> None:
    log = EventLog("r", store, clock=lambda: 7.5)
    records = [log.emit(news(i)) for i in range(3)]
    assert [(r.run_id, r.seq, r.time) for r in records] == [("r", 1, 7.5), ("r", 2, 7.5), ("r", 3, 7.5)]
    await log.sync()
    assert await store.read("r", 0, 9) == records


async def test_nothing_is_visible_before_it_is_durable() -> None:
    journal = Withheld()
    log = EventLog("r", journal)
    seen: list[int] = []

    async def watch() -> None:
        async for record in log.events():
            seen.append(record.seq)

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        for message in "abc":
            log.emit(news(message))
        log.emit(end())
        await anyio.wait_all_tasks_blocked()
        assert seen == []
        journal.write(2)
        await anyio.wait_all_tasks_blocked()
        assert seen == [1, 2]
        journal.write(4)
    assert seen == [1, 2, 3, 4]


async def test_sync_waits_for_the_disk() -> None:
    journal = Withheld()
    log = EventLog("r", journal)
    log.emit(news("a"))
    with anyio.move_on_after(1000) as scope:
        await log.sync()
    assert scope.cancelled_caught
    journal.write(1)
    await log.sync()


async def test_a_broken_journal_stops_the_run_and_tells_its_subscribers() -> None:
    journal = Withheld()
    log = EventLog("r", journal)
    log.emit(news("a"))
    journal.write(1)
    seen: list[int] = []
    told: list[str] = []

    async def watch() -> None:
        try:
            async for record in log.events():
                seen.append(record.seq)
        except StoreError as error:
            told.append(error.message)

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        await anyio.wait_all_tasks_blocked()
        journal.breaks()
    assert (seen, told) == ([1], ["the disk broke"])
    with pytest.raises(StoreError):
        log.emit(news("b"))
    with pytest.raises(StoreError):
        await log.sync()


async def test_nothing_comes_after_the_terminal_event(store: MemoryRunStore) -> None:
    log = EventLog("r", store)
    log.emit(end())
    assert log.ended
    with pytest.raises(RuntimeError, match="ended"):
        log.emit(news("late"))
    assert [r.seq async for r in log.events()] == [1]
    assert [r.seq async for r in log.events(after=1)] == []


async def test_a_subscriber_that_fell_out_of_memory_reads_on_from_the_journal(store: MemoryRunStore) -> None:
    log = EventLog("r", store, keep=10)
    written = [log.emit(news(i)) for i in range(1000)] + [log.emit(end())]
    assert [record async for record in log.events()] == written


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), keep=st.integers(1, 40), events=st.integers(0, 120), watchers=st.integers(1, 6))
def test_the_union_of_what_a_wandering_subscriber_reads_is_the_log(
    seed: int, keep: int, events: int, watchers: int
) -> None:
    backend, options = virtual_clock()
    anyio.run(_wander, seed, keep, events, watchers, backend=backend, backend_options=options)


async def _wander(seed: int, keep: int, events: int, watchers: int) -> None:
    chance = random.Random(seed)
    journal = Withheld()
    log = EventLog("r", journal, keep=keep)
    reads: list[list[EventRecord]] = [[] for _ in range(watchers)]
    async with anyio.create_task_group() as group:
        for mine in reads:
            group.start_soon(_wanderer, log, mine, random.Random(chance.random()))
        group.start_soon(_disk, journal, log, random.Random(chance.random()))
        for i in range(events):
            log.emit(news(i))
            if chance.random() < 0.3:
                await anyio.sleep(chance.random())
        log.emit(end())
    for mine in reads:
        assert mine == journal.records


async def _disk(journal: Withheld, log: EventLog, chance: random.Random) -> None:
    while not log.ended or journal.durable("r") < log.seq:
        await anyio.sleep(chance.random())
        if journal.durable("r") < log.seq:
            journal.write(chance.randint(journal.durable("r") + 1, log.seq))


async def _wanderer(log: EventLog, mine: list[EventRecord], chance: random.Random) -> None:
    """Read, stall, drop the connection and come again where it stopped, until the terminal event."""
    while not (mine and mine[-1].terminal):
        with anyio.move_on_after(chance.random() * 3):
            async for record in log.events(after=len(mine)):
                mine.append(record)
                if chance.random() < 0.2:
                    await anyio.sleep(chance.random() * 5)
                if chance.random() < 0.1:
                    break


async def test_many_subscribers_of_a_real_store_read_the_same_log(tmp_path: Path) -> None:
    async with MemoryRunStore() as store:
        await _watched_by_many(store)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_many_subscribers_of_a_sqlite_store_read_the_same_log(tmp_path: Path) -> None:
    async with SqliteRunStore(tmp_path / "runs.db") as store:
        await _watched_by_many(store)


async def _watched_by_many(store: Any) -> None:
    await store.create_run(RunRecord("r", "w"))
    log = EventLog("r", store, keep=16)
    reads: list[Sequence[int]] = []

    async def watch() -> None:
        reads.append([r.seq async for r in log.events()])

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(watch)
        for i in range(300):
            log.emit(news(i))
            if i % 50 == 0:
                await log.sync()
        log.emit(end())
    assert reads == [list(range(1, 302))] * 5
