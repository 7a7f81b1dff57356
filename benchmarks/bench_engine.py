"""What the engine costs: a trivial stage in event-loop turns, a long run's memory, the start of a run.

A turn is one ``await asyncio.sleep(0)``; it is measured right before and after every measurement, so that a busy or
slow machine changes both alike. Each figure is the median of the repetitions' ratios, ``best`` the lowest of them:
where the two are far apart, other work kept the machine busy, which hits what waits for another thread hardest.

    python benchmarks/bench_engine.py [--repetitions 40] [--stages 500] [--long 100000]
"""

import argparse
import asyncio
import gc
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
from _floor import committed, handed_over
from _table import machine, print_table

from crucible_kitchen.config import RunConfig
from crucible_kitchen.events import Event, EventRecord, WorkflowStop
from crucible_kitchen.store import MemoryRunStore, RunRecord, SqliteRunStore
from crucible_kitchen.telemetry.bus import EventLog
from crucible_kitchen.telemetry.prometheus import PrometheusSink
from crucible_kitchen.telemetry.sinks import RunInfo, pump
from crucible_kitchen.testing.faults import hangs, with_faults
from crucible_kitchen.types import Message
from crucible_kitchen.workers import Submissions
from crucible_kitchen.workflow.binding import binder_of
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow
from crucible_kitchen.workflow.run import RunContext
from crucible_kitchen.workflow.stage import signature_of, stage
from crucible_kitchen_noop import NoopLLMClient

BODY = 50
LANES = 64
BEHIND, SYNC = RunConfig(durability="behind"), RunConfig()
Measure = Callable[[int], Awaitable[float]]
"""Runs at least that many stages and returns the seconds a stage took."""


@stage()
async def trivial() -> None:
    """Do nothing."""


class Memory:
    """A recorder that only counts."""

    def __init__(self) -> None:
        self.seq = 0

    def emit(self, event: Event) -> EventRecord:
        self.seq += 1
        return EventRecord("run", self.seq, 0.0, event)

    async def sync(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def drain(self) -> None:
        return


def chain(stages: int, name: str = "bench") -> Workflow:
    """``stages`` trivial stages, 50 to a loop's turn."""
    body = [trivial.with_(name=f"s{i}") for i in range(BODY)]
    return Workflow(name, Loop("i", lambda: range(max(1, stages // BODY)), *body))


def single(stages: int) -> Workflow:
    """``stages`` trivial stages, one to a loop's turn."""
    return Workflow("bench", Loop("i", lambda: range(stages), trivial))


def lanes(stages: int) -> Workflow:
    """64 branches that share ``stages`` trivial stages."""
    each = chain(stages // LANES).body[0]
    return Workflow("bench", Parallel(*[[Workflow(f"lane{i}", each)] for i in range(LANES)]))


async def run(workflow: Workflow, config: RunConfig, recorder: Any) -> None:
    await execute(workflow, config, {}, RunContext("run", workflow.name, 0, Path(), recorder))


# -- what is measured ---------------------------------------------------------------------------------------------


async def turn(count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        await asyncio.sleep(0)
    return (time.perf_counter() - began) / count


async def bare(count: int) -> float:
    body = trivial.fn
    began = time.perf_counter()
    for _ in range(count):
        await body()
    return (time.perf_counter() - began) / count


def timed(make: Callable[[int], Workflow], config: RunConfig, log: Callable[[], Any]) -> Measure:
    """Return a measurement of one run with a log of its own."""

    async def measure(count: int) -> float:
        workflow = make(count)
        stages = count - count % (LANES * BODY) if make is lanes else count
        async with log() as recorder:
            began = time.perf_counter()
            await run(workflow, config, recorder)
            taken = time.perf_counter() - began
        return taken / stages

    return measure


@asynccontextmanager
async def in_memory() -> AsyncIterator[Any]:
    yield Memory()


class Logs:
    """Event logs on one store, each with a metrics sink."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._sink = PrometheusSink()
        self._count = 0

    @asynccontextmanager
    async def one(self) -> AsyncIterator[EventLog]:
        self._count += 1
        name = f"run{self._count}"
        await self._store.create_run(RunRecord(name, "bench"))
        log = EventLog(name, self._store)
        async with anyio.create_task_group() as group:
            group.start_soon(pump, self._sink, RunInfo(name, "bench"), log)
            yield log
            log.emit(WorkflowStop(recipe="bench", status="completed", duration_s=0.0))
            await log.sync()


def many_runs(logs: Logs) -> Measure:
    """Return a measurement of 64 runs at a time, each with a log of its own, from the first stage to the last."""

    async def measure(count: int) -> float:
        per_lane = max(BODY, count // LANES)
        workflow = chain(per_lane)
        async with AsyncExitStack() as open_logs:
            opened = [await open_logs.enter_async_context(logs.one()) for _ in range(LANES)]
            began = time.perf_counter()
            async with anyio.create_task_group() as group:
                for log in opened:
                    group.start_soon(run, workflow, SYNC, log)
            taken = time.perf_counter() - began
        return taken / (per_lane // BODY * BODY * LANES)

    return measure


@dataclass
class Case:
    """A row: what is measured, how many stages at a time, and the target in turns."""

    name: str
    measure: Measure
    stages: int
    target: float | None = None


async def in_turns(case: Case, repetitions: int) -> tuple[float, float, float]:
    """Return (median turns, fewest turns, median microseconds) of a stage."""
    ratios, seconds = [], []
    await case.measure(case.stages)  # warm up
    for _ in range(repetitions):
        gc.collect()
        before = await turn(500)
        taken = await case.measure(case.stages)
        after = await turn(500)
        ratios.append(taken / ((before + after) / 2))
        seconds.append(taken)
    return statistics.median(ratios), min(ratios), statistics.median(seconds) * 1e6


async def stage_costs(repetitions: int, stages: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with SqliteRunStore(Path(folder) / "runs.db") as sqlite, MemoryRunStore() as memory:
            disk, ram = Logs(sqlite), Logs(memory)
            wide = LANES * BODY
            cases = [
                Case("bare coroutine", bare, 10 * stages),
                Case("timeout, events, recorder in memory", timed(chain, BEHIND, in_memory), stages, 10),
                Case("the same, one stage to a loop's turn", timed(single, BEHIND, in_memory), stages),
                Case("event log in memory, metrics sink", timed(chain, BEHIND, ram.one), stages, 10),
                Case("SQLite log `behind`, metrics sink", timed(chain, BEHIND, disk.one), stages, 12),
                Case("a thread and back", handed_over, stages),
                Case("a thread that commits one row, and back", committed, stages),
                Case("SQLite log `sync`, one lane", timed(chain, SYNC, disk.one), stages, 35),
                Case("SQLite log `sync`, 64 branches", timed(lanes, SYNC, disk.one), wide, 18),
                Case("SQLite log `sync`, 64 runs", many_runs(disk), wide),
            ]
            rows = [["one event-loop turn", 1.0, 1.0, await turn(20_000) * 1e6, "", ""]]
            for case in cases:
                turns, best, micros = await in_turns(case, repetitions)
                verdict = "" if case.target is None else ("yes" if turns <= case.target else "NO")
                rows.append(
                    [case.name, turns, best, micros, "" if case.target is None else f"<= {case.target}", verdict]
                )
    print_table(f"A trivial stage ({machine()})", ["with", "turns", "best", "µs", "target", "held"], rows)


# -- memory and start ---------------------------------------------------------------------------------------------


async def memory_of_a_long_run(stages: int) -> None:
    """Compare what is allocated at a tenth, at half and at the end of one long run."""
    marks: dict[int, int] = {}

    @stage()
    async def look(i: int) -> None:
        if i + 1 in (stages // 10, stages // 2, stages):
            gc.collect()
            marks[i + 1] = tracemalloc.get_traced_memory()[0]

    with tempfile.TemporaryDirectory() as folder:
        async with SqliteRunStore(Path(folder) / "runs.db") as store:
            tracemalloc.start()
            began = time.perf_counter()
            async with Logs(store).one() as log:
                await run(Workflow("bench", Loop("i", lambda: range(stages), look)), BEHIND, log)
            taken = time.perf_counter() - began
            tracemalloc.stop()
    rows = [[at, used / 1e6, (used - marks[stages // 10]) / 1e6] for at, used in marks.items()]
    print_table(f"Memory of one run, SQLite log `behind` ({taken:.1f} s traced)", ["stages", "MB", "growth MB"], rows)


def realistic() -> Workflow:
    """A tree like the shipped ones: a resource, nested loops, tests, twenty stages."""
    first = [trivial.with_(name=f"a{i}") for i in range(6)]
    inner = [trivial.with_(name=f"b{i}") for i in range(6)]
    tests = [When(lambda: True, trivial.with_(name=f"c{i}")) for i in range(4)]
    last = [trivial.with_(name=f"d{i}") for i in range(4)]
    epochs = Loop("epoch", lambda: range(1), Loop("batch", lambda: range(1), *inner, *tests))
    return Workflow("realistic", *first, epochs, *last)


async def start_of_a_run(repetitions: int) -> None:
    """Measure check and the way to the first stage's body, with nothing cached and with everything cached."""
    reached: list[float] = []

    async def arrive() -> None:
        reached.append(time.perf_counter())

    rows = []
    for label, cold in (("first run of a workflow", True), ("later runs", False)):
        taken = []
        for _ in range(repetitions):
            workflow = Workflow("w", stage(name="arrive")(arrive), *realistic().body)
            if cold:
                signature_of.cache_clear()
                binder_of.cache_clear()
            began = time.perf_counter()
            check(workflow, adapters={}, config=SYNC)
            await run(workflow, SYNC, Memory())
            taken.append(reached[-1] - began)
        rows.append(
            [label, statistics.median(taken) * 1e3, "<= 5", "yes" if statistics.median(taken) <= 5e-3 else "NO"]
        )
    print_table("From `check` to the first stage's body", ["start", "ms", "target", "held"], rows)


class Waiting:
    """Waits for ever in three ways, and says when each wait was ended."""

    def __init__(self) -> None:
        self.reached: list[float] = []
        self._hanging = with_faults(NoopLLMClient(), hangs("chat", times=0))

    async def ended(self, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            await call()
        finally:
            self.reached.append(time.perf_counter())

    async def in_a_stage(self) -> None:
        await self.ended(anyio.sleep_forever)

    async def in_an_adapter(self) -> None:
        await self.ended(lambda: self._hanging.chat([Message("user", "?")]))

    async def for_a_submission(self) -> None:
        async def awaited() -> None:
            await calls.submit(anyio.sleep_forever)

        async with Submissions() as calls:
            await self.ended(awaited)


async def cancelled(call: Callable[[], Awaitable[None]], waiting: Waiting, branches: int) -> tuple[float, float]:
    """Cancel a run of many waiting calls; return the milliseconds to the 99th of a hundred, and to the run's end."""
    workflow = Workflow("bench", Parallel(*[stage(name=f"s{i}")(call) for i in range(branches)]))
    waiting.reached.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(run, workflow, SYNC, Memory())
        await anyio.wait_all_tasks_blocked()
        began = time.perf_counter()
        group.cancel_scope.cancel()
    ended = time.perf_counter()
    assert len(waiting.reached) == branches
    return (sorted(waiting.reached)[int(branches * 0.99)] - began) * 1e3, (ended - began) * 1e3


async def cancelling(branches: int, repetitions: int) -> None:
    """Measure the time from a cancellation to each of many waiting calls."""
    waiting, rows = Waiting(), []
    for what, call, target in (
        ("stages", waiting.in_a_stage, 50),
        ("calls of an adapter", waiting.in_an_adapter, 50),
        ("sessions, each with a pending call, closed meanwhile", waiting.for_a_submission, None),
    ):
        found = [await cancelled(call, waiting, branches) for _ in range(repetitions)]
        p99, end = (statistics.median(column) for column in zip(*found, strict=True))
        verdict = "" if target is None else ("yes" if p99 <= target else "NO")
        rows.append([f"{branches} {what}", p99, "" if target is None else f"<= {target}", verdict, end])
    print_table("From a cancellation to what it ends", ["waiting", "p99 ms", "target", "held", "run over ms"], rows)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--stages", type=int, default=500)
    parser.add_argument("--long", type=int, default=100_000)
    args = parser.parse_args()
    await stage_costs(args.repetitions, args.stages)
    await start_of_a_run(args.repetitions)
    await cancelling(1000, 7)
    await memory_of_a_long_run(args.long)


if __name__ == "__main__":
    asyncio.run(main())
