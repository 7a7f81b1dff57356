"""``events --follow``, and what ``show`` tells of a run under way: from the store alone, while it is written."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen import Kitchen, Run, Workflow, stage
from crucible_kitchen.cli.reading import course, followed
from crucible_kitchen.errors import RunStalled
from crucible_kitchen.events import WarningRaised
from crucible_kitchen.store import Owner, RunRecord, SqliteRunStore


@pytest.mark.anyio
async def test_events_are_followed_while_they_come_to_the_end_of_the_last_attempt(home: Path) -> None:
    go_on = anyio.Event()

    @stage()
    async def waits(run: Run) -> None:
        run.warn("waiting", "for the follower")
        await go_on.wait()

    async with Kitchen(home=home) as kitchen, SqliteRunStore(home / "runs.db") as other:
        run = await kitchen.start(Workflow("w", waits))
        names = []
        with anyio.fail_after(30):
            async for record in followed(other, run.id, pause=0.01):
                names.append(record.event.name)
                if isinstance(record.event, WarningRaised):
                    go_on.set()  # it could only come here while the run was still under way
        assert names == ["workflow.start", "stage.start", "warning", "stage.stop", "workflow.stop"]


@pytest.mark.usefixtures("flows")
def test_a_run_that_has_ended_is_followed_to_its_end_at_once(cli: Any) -> None:
    run_id = cli("run", "flows.py:cook", "--json").json["run_id"]
    told = cli("events", run_id, "--follow", "--after", 1)
    assert [line.split()[0] for line in told.out.splitlines()] == ["2", "3", "4"]
    assert cli("events", "--follow", "--json").json["event"] == "workflow.stop"
    assert cli("events", "nothing", "--follow").code == 2


def test_following_a_run_whose_process_is_gone_ends_and_says_so(cli: Any, home: Path) -> None:
    async def begin() -> None:
        async with SqliteRunStore(home / "runs.db") as store:
            here = Owner.here()
            gone = Owner(here.host, here.boot, here.namespace, here.pid, here.born + 1)  # its number, used again
            await store.create_run(RunRecord("orphan", "cook", created_at=1.0), gone)

    anyio.run(begin)
    told = cli("events", "orphan", "--follow")
    assert told.code == 0
    assert "resume orphan" in told.err
    shown = cli("show", "orphan").out
    assert "1  crashed" in shown
    assert "crucible-kitchen resume orphan" in shown


@pytest.mark.anyio
async def test_show_tells_what_a_stalled_run_waits_for_and_who_has_it(home: Path) -> None:
    seen: list[dict[str, Any]] = []

    @stage()
    async def stuck() -> None:
        await anyio.sleep_forever()

    async with Kitchen(home=home) as kitchen, SqliteRunStore(home / "runs.db") as other:
        run = await kitchen.start(Workflow("w", stuck), {"stall_after": 0.05})
        with anyio.fail_after(30):
            async for record in followed(other, run.id, pause=0.01):
                if record.event.name == "run.stalled":
                    seen.append(await course(other, run.id))
                    await run.cancel()
    (facts,) = seen
    assert facts["stall"]["still"]
    assert facts["stall"]["culprit"].startswith("w/stuck is in its own code")
    assert facts["attempts"][0]["owner_alive"] is True


@pytest.mark.anyio
async def test_show_keeps_the_stall_that_ended_a_run(cli: Any, home: Path) -> None:
    @stage()
    async def stuck() -> None:
        await anyio.sleep_forever()

    async with Kitchen(home=home) as kitchen:
        run = await kitchen.start(Workflow("w", stuck), {"stall_after": 0.05, "on_stall": "abort"})
        with pytest.raises(RunStalled):
            await run.wait()
    shown = await anyio.to_thread.run_sync(lambda: cli("show", run.id).out)
    assert "w/stuck is in its own code" in shown
    assert "[run.stalled]" in shown
    assert "waits\n  w/stuck  stage for 0 s at " in shown
