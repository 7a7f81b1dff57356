"""Three processes over one run, in any order, against a model of a few lines: who may write, and what is there.

The processes are stores over the same runs; the third one is known to be dead whenever another one looks. The clock
is the test's, and goes back too.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from crucible_kitchen.errors import CrucibleError, LeaseLost, RunEnded, RunLive, RunNotFound
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import Checkpoint, MemoryRunStore, Owner, RunRecord, RunStore, SqliteRunStore, StageRecord
from crucible_kitchen.testing.stores import dead_owner

R = TypeVar("R")
TTL = 10.0
OWNERS = (Owner("far", "b", "n", 1, 1), Owner("farther", "b", "n", 1, 1), dead_owner())
PROCESSES = st.integers(0, 2)
ENDS = st.sampled_from(["completed", "failed", "cancelled", "paused"])


@dataclass
class Model:
    """What should be true: the attempts' statuses, whose the last one is, until when, and what was written."""

    attempts: list[str] = field(default_factory=lambda: ["running"])
    holder: int | None = 0
    until: float = TTL
    log: list[int] = field(default_factory=list)
    stages: dict[str, int] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    believed: dict[int, tuple[int, type[CrucibleError] | None]] = field(default_factory=lambda: {0: (1, None)})
    """By process: the attempt that it opened, and how it knows that it is over."""

    def free(self, now: float) -> bool:
        return self.holder is not None and (now >= self.until or self.holder == 2)

    def end(self, status: str) -> None:
        self.attempts[-1] = status
        self.holder = None

    def refuses(self, process: int) -> type[CrucibleError] | None:
        """The error that a write of this process is answered with."""
        if process not in self.believed:
            return RunEnded if self.holder is None else LeaseLost
        epoch, over = self.believed[process]
        if over is not None:
            return over
        return None if self.holder == process and epoch == len(self.attempts) else LeaseLost

    def learns(self, process: int, error: type[CrucibleError]) -> None:
        if process in self.believed:
            self.believed[process] = (self.believed[process][0], error)


class Ownership(RuleBasedStateMachine):
    """The rules; a subclass says which store."""

    def open_stores(self) -> list[RunStore]:
        first = MemoryRunStore(clock=lambda: self.now)
        return [first, *(MemoryRunStore(clock=lambda: self.now, beside=first) for _ in range(2))]

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.runner = asyncio.Runner()
        self.model = Model()
        self.leases: dict[int, Any] = {}

    def do(self, call: Coroutine[Any, Any, R]) -> R:
        return self.runner.run(call)

    @initialize()
    def begin(self) -> None:
        self.stores = self.open_stores()
        for store in self.stores:
            self.do(store.open())
        self.leases[0] = self.do(self.stores[0].create_run(RunRecord("r", "w"), OWNERS[0], TTL))

    def teardown(self) -> None:
        for store in getattr(self, "stores", ()):
            self.do(store.aclose())
        self.runner.close()

    def outcome(self, call: Coroutine[Any, Any, Any]) -> type[CrucibleError] | None:
        """Return how a call ends."""
        try:
            self.do(call)
        except CrucibleError as error:
            return type(error)
        return None

    def writes(self, process: int, call: Coroutine[Any, Any, Any]) -> bool:
        """Check that a write is refused, or not, as the model says; return whether it took place."""
        expected = self.model.refuses(process)
        assert self.outcome(call) == expected
        if expected is not None:
            self.model.learns(process, expected)
        return expected is None

    @rule(seconds=st.sampled_from([-20.0, -1.0, 1.0, 5.0, TTL, 3 * TTL]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(process=PROCESSES)
    def opens(self, process: int) -> None:
        model = self.model
        expected: type[CrucibleError] | None = None
        if model.holder is not None and not model.free(self.now):
            expected = RunLive
        elif model.attempts[-1] == "completed":
            expected = RunEnded

        async def call() -> None:
            self.leases[process] = await self.stores[process].open_attempt("r", OWNERS[process], TTL)

        assert self.outcome(call()) == expected
        if expected is None:
            if model.holder is not None:
                model.end("crashed")
            model.attempts.append("running")
            model.holder, model.until = process, self.now + TTL
            model.believed[process] = (len(model.attempts), None)
            assert self.leases[process].seq == len(model.log)
            assert self.leases[process].epoch == len(model.attempts)

    @rule(process=PROCESSES)
    def renews(self, process: int) -> None:
        lease = self.leases.get(process)
        if lease is None:
            return
        model = self.model
        ours = model.holder == process and lease.epoch == len(model.attempts)
        assert self.outcome(self.stores[process].renew(lease, TTL)) == (None if ours else LeaseLost)
        if ours:
            model.until = max(model.until, self.now + TTL)
        elif model.believed[process][1] is None:
            model.learns(process, LeaseLost)

    @rule(process=PROCESSES, count=st.integers(1, 3))
    def appends(self, process: int, count: int) -> None:
        store, first = self.stores[process], self.stores[process].durable("r") + 1

        async def call() -> None:
            seqs = range(first, first + count)
            store.append([EventRecord("r", seq, 0.0, WarningRaised(code="c", message="m")) for seq in seqs])
            await store.flush("r", first + count - 1)

        if process not in self.model.believed:
            assert self.outcome(call()) == RunNotFound
        elif self.writes(process, call()):
            self.model.log += range(first, first + count)

    @rule(process=PROCESSES, path=st.sampled_from(["w/a", "w/b"]), value=st.integers(0, 9))
    def records(self, process: int, path: str, value: int) -> None:
        store = self.stores[process]

        async def call() -> None:
            store.record(StageRecord("r", path, "in", "out", value, 0))
            await store.flush("r", 0)

        if process not in self.model.believed:
            assert self.outcome(call()) == RunNotFound
        elif self.writes(process, call()):
            self.model.stages[path] = value

    @rule(process=PROCESSES)
    def saves(self, process: int) -> None:
        model = self.model
        if process not in model.believed or model.believed[process][1] is not None:
            return
        number = len(model.checkpoints) + 1
        made = Checkpoint("r", number, "w/s", "w/s", 0, model.believed[process][0], 0, 0.0)
        if self.writes(process, self.stores[process].put_checkpoint(made)):
            model.checkpoints.append(number)

    @rule(process=PROCESSES, status=ENDS)
    def ends(self, process: int, status: Any) -> None:
        if self.writes(process, self.stores[process].finish_run("r", status, {})):
            self.model.end(status)
            self.model.learns(process, RunEnded)

    @rule(process=PROCESSES)
    def looks_for_orphans(self, process: int) -> None:
        found = self.do(self.stores[process].reconcile())
        assert [run.run_id for run in found] == ["r"] * self.model.free(self.now)
        if found:
            self.model.end("crashed")

    @invariant()
    def what_is_there_is_what_was_written(self) -> None:
        if not hasattr(self, "stores"):
            return
        store = self.stores[len(self.model.log) % 3]
        assert [record.seq for record in self.do(store.read("r", 0, 10_000))] == self.model.log
        assert {r.path: r.value for r in self.do(store.records("r"))} == self.model.stages
        assert [c.number for c in self.do(store.checkpoints("r"))] == self.model.checkpoints[::-1]
        assert [attempt.status for attempt in self.do(store.attempts("r"))] == self.model.attempts
        assert self.do(store.run("r")).status == self.model.attempts[-1]
        assert [one.pending for one in self.stores] == [0, 0, 0]


class OwnershipInSqlite(Ownership):
    """The same in a file."""

    def open_stores(self) -> list[RunStore]:
        self.folder = TemporaryDirectory()
        return [SqliteRunStore(Path(self.folder.name) / "runs.db", clock=lambda: self.now) for _ in range(3)]

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            self.folder.cleanup()


def _case(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> Any:
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
    )
    return case


TestOwnership = _case(Ownership, 60, 40)
TestOwnershipInSqlite = _case(OwnershipInSqlite, 30, 30)
