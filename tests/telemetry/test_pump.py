"""The pump: a sink that fails, stalls or hangs never stops, slows or falsifies a run. On virtual time."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import pytest

from crucible_kitchen.events import EventRecord, WarningRaised, WorkflowStop
from crucible_kitchen.store import MemoryRunStore, RunRecord
from crucible_kitchen.telemetry import EventLog, RunInfo, Sink, pump
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.testing.sink import RecordingSink

pytestmark = pytest.mark.anyio
RUN = RunInfo("r", "supervised")


@pytest.fixture
def anyio_backend() -> Any:
    return virtual_clock()


@pytest.fixture
async def log() -> AsyncIterator[EventLog]:
    async with MemoryRunStore() as store:
        await store.create_run(RunRecord("r", "w"))
        yield EventLog("r", store)


def emit(log: EventLog, count: int) -> None:
    for i in range(count):
        log.emit(WarningRaised(code="c", message=str(i)))


def finish(log: EventLog) -> None:
    log.emit(WorkflowStop(recipe="w", status="completed", duration_s=1.0))


async def test_a_sink_gets_the_whole_log_in_order(log: EventLog) -> None:
    sink = RecordingSink()
    assert isinstance(sink, Sink)
    async with anyio.create_task_group() as group:
        group.start_soon(pump, sink, RUN, log)
        emit(log, 600)
        await anyio.sleep(1)
        emit(log, 3)
        finish(log)
    assert sink.runs == [RUN]
    assert [r.seq for r in sink.records] == list(range(1, 605))


async def test_a_sink_that_is_behind_catches_up_without_a_pause(log: EventLog) -> None:
    sink = RecordingSink()
    emit(log, 2_000)
    finish(log)
    began = anyio.current_time()
    await pump(sink, RUN, log)
    assert len(sink.records) == 2_001
    assert anyio.current_time() == began


async def test_a_sink_that_fails_for_a_while_loses_nothing(log: EventLog) -> None:
    sink = RecordingSink(failures=4)
    emit(log, 5)
    finish(log)
    await pump(sink, RUN, log)
    assert [r.seq for r in sink.records] == list(range(1, 7))


async def test_a_sink_that_always_fails_is_disabled_with_a_warning_and_the_run_goes_on(log: EventLog) -> None:
    good, bad = RecordingSink(), RecordingSink(failures=-1)
    async with anyio.create_task_group() as group:
        group.start_soon(pump, bad, RUN, log)
        group.start_soon(pump, good, RUN, log)
        emit(log, 5)
        await anyio.sleep(60)
        finish(log)
    assert bad.records == []
    (warning,) = [e for e in good.events if isinstance(e, WarningRaised) and e.code == "telemetry.sink_disabled"]
    assert "ConnectionError" in warning.message
    assert "told to fail" not in warning.message
    assert good.names[-1] == "workflow.stop"


async def test_a_sink_that_cannot_open_is_disabled(log: EventLog) -> None:
    class Unopenable(RecordingSink):
        async def open(self, run: RunInfo) -> None:
            raise ConnectionError("no")

    sink = Unopenable()
    emit(log, 1)
    await pump(sink, RUN, log)
    finish(log)
    assert sink.records == []
    assert [r.event.name async for r in log.events()] == ["warning", "warning", "workflow.stop"]


async def test_a_stalled_sink_does_not_hold_up_the_run_and_catches_up(log: EventLog) -> None:
    sink = RecordingSink(stalled=True)
    async with anyio.create_task_group() as group:
        group.start_soon(pump, sink, RUN, log)
        emit(log, 10_000)
        await log.sync()
        assert sink.records == []
        finish(log)
        await anyio.sleep(5)
        sink.release()
    assert [r.seq for r in sink.records] == list(range(1, 10_002))


async def test_a_sink_that_hangs_is_given_up_even_after_the_run_has_ended(log: EventLog) -> None:
    sink = RecordingSink(stalled=True)
    finish(log)
    before = anyio.current_time()
    await pump(sink, RUN, log)
    assert anyio.current_time() - before == pytest.approx(10)
    assert sink.records == []


async def test_one_sink_serves_runs_at_the_same_time() -> None:
    class Sorted(RecordingSink):
        async def handle(self, records: Sequence[EventRecord]) -> None:
            assert len({r.run_id for r in records}) == 1
            await super().handle(records)

    sink = Sorted()
    async with MemoryRunStore() as store:
        async with anyio.create_task_group() as group:
            for name in ("a", "b"):
                await store.create_run(RunRecord(name, "w"))
                log = EventLog(name, store)
                group.start_soon(pump, sink, RunInfo(name, "w"), log)
                emit(log, 20)
                finish(log)
    for name in ("a", "b"):
        assert [r.seq for r in sink.records if r.run_id == name] == list(range(1, 22))


async def test_a_journal_that_breaks_ends_the_pump_quietly(log: EventLog) -> None:
    async with MemoryRunStore() as store:
        await store.create_run(RunRecord("x", "w"))
        broken = EventLog("x", store)
        async with anyio.create_task_group() as group:
            group.start_soon(pump, RecordingSink(), RunInfo("x", "w"), broken)
            await anyio.wait_all_tasks_blocked()
            await store.aclose()
