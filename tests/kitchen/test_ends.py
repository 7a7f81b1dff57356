"""Every attempt ends once, whatever happens to a run and in whatever order: whole runs against a model of a dict."""

import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule

from crucible_kitchen import Kitchen, Run, Workflow, stage
from crucible_kitchen.errors import RunCancelled, RunEnded, RunPaused, StorageFull, TrainingError
from crucible_kitchen.events import WorkflowStop
from crucible_kitchen.runs import RunHandle
from crucible_kitchen.store import SqliteRunStore
from crucible_kitchen.testing.stores import FaultyStore

ACT: dict[str, Any] = {}
"""What the next attempt does, and how it says that it got there."""


@stage(writes="door")
async def door(run: Run) -> AsyncIterator[int]:
    """Opened anew by every attempt: here it is decided how the attempt ends."""
    if ACT["how"] == "fail":
        raise TrainingError("as it was told")
    if ACT["how"] in ("cancel", "drain"):
        ACT["there"].set()
        await ACT["go"].wait()
    yield 1


@stage(writes="through")
async def through(door: int) -> int:
    return door


ends = Workflow("ends", door, through)
RAISES = {"fail": TrainingError, "cancel": RunCancelled, "drain": RunPaused}
SHOULD = {"complete": "completed", "fail": "failed", "cancel": "cancelled"}
HOW = st.sampled_from(["complete", "fail", "cancel", "drain", *range(3, 9)])
"""A number is the write at which the process dies; before the third there is no run yet, or no attempt."""


async def to_its_end(handle: RunHandle, how: Any) -> str:
    """Bring an attempt to its end and return the status that its handle tells."""
    async with anyio.create_task_group() as group:
        if how in ("cancel", "drain"):
            await ACT["there"].wait()
            group.start_soon(handle.cancel if how == "cancel" else handle.drain)
            await anyio.wait_all_tasks_blocked()
            ACT["go"].set()
        raised: Exception | None = None
        try:
            await handle.wait()
        except tuple(RAISES.values()) as error:
            raised = error
        assert (raised is None) == (handle.status == "completed")
        assert raised is None or isinstance(raised, RAISES[how])
    return handle.status


class Ends(RuleBasedStateMachine):
    """The model: a list of statuses by run, one for each attempt."""

    known = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="ends"))
        self.model: dict[str, list[str]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    @rule(target=known, how=HOW)
    def begins(self, how: Any) -> Any:
        return anyio.run(self.attempt, None, how)

    @rule(run_id=known, how=HOW)
    def goes_on(self, run_id: str, how: Any) -> None:
        anyio.run(self.attempt, run_id, how)

    @rule()
    def somebody_looks_for_orphans(self) -> None:
        async def look() -> list[str]:
            async with SqliteRunStore(self.home / "runs.db") as store:
                return [record.run_id for record in await store.reconcile()]

        found = anyio.run(look)
        assert sorted(found) == sorted(self.orphans_are_found())

    def orphans_are_found(self) -> list[str]:
        """Tell the model that somebody looked, as a kitchen does when it opens."""
        orphans = [run_id for run_id, statuses in self.model.items() if statuses[-1] == "running"]
        for run_id in orphans:
            self.model[run_id][-1] = "crashed"
        return orphans

    async def attempt(self, run_id: str | None, how: Any) -> str:
        """Make an attempt, tell the model how it should have ended, and compare."""
        dies = isinstance(how, int)
        ACT.update(how="complete" if dies else how, there=anyio.Event(), go=anyio.Event())
        store = FaultyStore(SqliteRunStore(self.home / "runs.db"), at=how if dies else None)
        async with Kitchen(home=self.home, store=store) as kitchen:
            self.orphans_are_found()
            if run_id is None:
                handle = await kitchen.start(ends)
            elif self.model[run_id][-1] == "completed":
                with pytest.raises(RunEnded):
                    await kitchen.reopen(run_id, target=ends)
                return run_id
            else:
                handle = await kitchen.reopen(run_id, target=ends)
            told = await to_its_end(handle, how)
        statuses = self.model.setdefault(handle.id, [])
        statuses.append("running" if store.struck else told)
        if not store.struck and how in SHOULD:
            assert told == SHOULD[how]
        await self.agrees(handle.id)
        return handle.id

    async def agrees(self, run_id: str) -> None:
        """Compare the store, the attempts and the log with the model."""
        statuses = self.model[run_id]
        async with SqliteRunStore(self.home / "runs.db") as store:
            record = await store.run(run_id)
            attempts = await store.attempts(run_id)
            records = await store.read(run_id, 0, 10_000)
        assert record.status == statuses[-1]
        assert [attempt.status for attempt in attempts] == statuses
        assert (record.error is not None) == (statuses[-1] == "failed")
        assert [kept.seq for kept in records] == list(range(1, len(records) + 1))
        stops = [kept.event.status for kept in records if isinstance(kept.event, WorkflowStop)]
        ended = [status for status in statuses if status not in ("running", "crashed")]
        assert [stop for stop in stops if stop in ended] == stops
        if statuses[-1] not in ("running", "crashed"):
            assert isinstance(records[-1].event, WorkflowStop)
            assert stops[-1] == statuses[-1]


@pytest.mark.anyio
@pytest.mark.parametrize("error", [None, StorageFull("the disk is full")], ids=["dies", "disk is full"])
async def test_a_run_that_ends_at_any_write_does_not_exist_or_goes_on(home: Path, error: StorageFull | None) -> None:
    ACT.update(how="complete")
    for ends_at in itertools.count(1):
        place = home / str(ends_at)
        store = FaultyStore(SqliteRunStore(place / "runs.db"), at=ends_at, error=error)
        with suppress(StorageFull):
            await Kitchen(home=place, store=store).run(ends)
            assert error is None or not store.struck, "a run without its log went on"
        if not store.struck:
            break
        async with Kitchen(home=place) as kitchen:
            for left in await kitchen.store.runs():
                assert (await kitchen.resume(left.run_id, target=ends)).state.through == 1, f"ended at write {ends_at}"
    assert ends_at > 10


TestEnds = Ends.TestCase
TestEnds.settings = settings(max_examples=20, stateful_step_count=8, deadline=None)
