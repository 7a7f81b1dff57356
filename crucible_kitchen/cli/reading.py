"""The commands that look at one run, past or present: ``show`` and ``events``.

They read the run store and change nothing but the status of runs whose process is gone. Read next:
``crucible_kitchen.cli.summary``.
"""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from crucible_kitchen.cli.console import answer, answer_json, block, plain, reporting, say, table
from crucible_kitchen.cli.options import DEFAULT_HOME, HomeOption, JsonOption
from crucible_kitchen.cli.summary import clock, run_facts, summary

if TYPE_CHECKING:
    from crucible_kitchen.events import EventRecord
    from crucible_kitchen.store import RunStore

__all__ = ["events", "pages", "read", "show"]

T = TypeVar("T")

PAGE = 1000
FOLLOW_SECONDS = 0.2
"""Between two looks into the store for new events."""


def read(home: Path, ask: "Callable[[RunStore], Awaitable[T]]") -> T:
    """Open the run store below a home, ask it, and close it; what a dead process left running is called crashed."""
    from contextlib import suppress

    import anyio

    from crucible_kitchen.errors import StoreError
    from crucible_kitchen.store import MemoryRunStore, SqliteRunStore

    async def asked() -> T:
        path = home / "runs.db"
        async with SqliteRunStore(path) if path.is_file() else MemoryRunStore() as store:
            with suppress(StoreError):  # a disk that cannot be written can still be read
                await store.reconcile()
            return await ask(store)

    return anyio.run(asked)


@reporting
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of it.", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Show what a run gave and what it was. Its attempts, its checkpoints, and what it waits for if it stalled."""

    async def asked(store: "RunStore") -> dict[str, Any]:
        return await run_facts(store, run) | await course(store, run)

    facts = read(home, asked)
    if as_json:
        answer_json(facts)
        return
    for line in summary(facts, home)[:-1]:
        answer(line)
    answer(f"  {'workflow':<11} {facts['workflow']}")
    answer(f"  {'started':<11} {clock(facts['created_at'])}")
    if error := facts["error"]:
        place = f"{error['where']}: " if error.get("where") else ""
        answer(f"  {'error':<11} [{error['code']}] {place}{error['message']}")
        if error.get("hint"):
            answer(f"  {'hint':<11} {error['hint']}")
    if facts["status"] in ("crashed", "failed", "cancelled", "paused"):
        answer(f"  {'go on':<11} crucible-kitchen resume {facts['run_id']}")
    if stall := facts["stall"]:
        answer(f"  {'stalled' if stall['still'] else 'had stalled':<11} {stall['culprit']} ({clock(stall['time'])})")
    block("waits", [(wait["who"] or "a task", _wait(wait)) for wait in stall["waits"]] if stall else ())
    block("attempts", [(str(attempt["number"]), _attempt(attempt)) for attempt in facts["attempts"]])
    block("checkpoints", [(str(kept["number"]), _checkpoint(kept)) for kept in facts["checkpoints"]])
    block("config", _given(facts["config"]).items())
    block("metrics", _measured(facts["metrics"]).items())
    block("artifacts", [(a["kind"], f"{a['uri']} ({a['size']} bytes) {a['name']}") for a in facts["artifacts"]])


async def course(store: "RunStore", run: str) -> dict[str, Any]:
    """Return a run's attempts, checkpoints, and the last stall of one that has not completed."""
    record = await store.run(run)
    attempts = await store.attempts(record.run_id)
    stall: dict[str, Any] | None = None
    if record.status != "completed":
        async for kept in pages(store, record.run_id, attempts[-1].seq if attempts else 0):
            if kept.event.name == "run.stalled":
                stall = kept.event.to_json() | {"seq": kept.seq, "time": kept.time, "still": True}
            elif stall is not None:
                stall["still"] = False
    return {
        "attempts": [
            {
                "number": attempt.number,
                "status": attempt.status,
                "owner": str(attempt.owner),
                "owner_alive": attempt.owner.alive() if attempt.status == "running" else None,
                "started_at": attempt.started_at,
                "ended_at": attempt.ended_at,
                "error": attempt.error,
            }
            for attempt in attempts
        ],
        "checkpoints": [
            {
                "number": kept.number,
                "session": kept.session,
                "place": kept.place,
                "step": kept.step,
                "attempt": kept.epoch,
                "created_at": kept.created_at,
                "damaged": kept.damaged,
            }
            for kept in await store.checkpoints(record.run_id)
        ],
        "stall": stall,
    }


def _attempt(attempt: dict[str, Any]) -> str:
    took = f" for {attempt['ended_at'] - attempt['started_at']:.1f} s" if attempt["ended_at"] else ""
    owner = ""
    if attempt["status"] == "running":
        lives = {True: "it lives", False: "it is gone: `resume` goes on", None: "not to be seen from here"}
        owner = f", owned by {attempt['owner']} ({lives[attempt['owner_alive']]})"
    error = f" [{attempt['error']['code']}]" if attempt["error"] else ""
    return f"{attempt['status']}{error} since {clock(attempt['started_at'])}{took}{owner}"


def _checkpoint(kept: dict[str, Any]) -> str:
    damaged = ", damaged" if kept["damaged"] else ""
    return (
        f"step {kept['step']} of {kept['session']} at {clock(kept['created_at'])}, attempt {kept['attempt']}{damaged}"
    )


def _wait(wait: dict[str, Any]) -> str:
    what = f"{wait['cause']} {wait['whom']}".strip()
    return f"{what} for {wait['for_s']:.0f} s" + (f" at {wait['at']}" if wait["at"] else "")


def _given(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config's values that say something: what is unset or empty is left out."""
    return {key: value for key, value in config.items() if value is not None and value not in ("", [], {})}


def _measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of the data and the model: how long the last stage took says little."""
    return {key: value for key, value in metrics.items() if not key.startswith(("stage.", "workflow."))}


@reporting
def events(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run's id, or the beginning of it; the newest run if there is none."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="List the events that there are, with their fields.")
    ] = False,
    after: Annotated[int, typer.Option("--after", metavar="SEQ", min=0, help="Only what came after this place.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until the run's last attempt has ended.")
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Show the events of a run, or what events there are.

    With --follow they are shown as they come, from another process too; --json then writes one object a line.
    """
    if schema:
        _schema(as_json=as_json)
        return
    if follow:
        read(home, partial(_follow, run=run, after=after, as_json=as_json))
        return
    found = read(home, partial(_events, run=run, after=after))
    if as_json:
        answer_json([record.to_json() for record in found])
        return
    for record in found:
        answer(_event_line(record))


async def _events(store: "RunStore", *, run: str | None, after: int) -> "list[EventRecord]":
    newest = await store.runs(1) if run is None else []
    record = newest[0] if newest else await store.run(run or "")
    return [event async for event in pages(store, record.run_id, after)]


async def pages(store: "RunStore", run_id: str, after: int) -> "AsyncIterator[EventRecord]":
    """Yield the events of a run after a place, as far as they are there now."""
    while page := await store.read(run_id, after, PAGE):
        for record in page:
            yield record
        after = page[-1].seq


async def _follow(store: "RunStore", *, run: str | None, after: int, as_json: bool) -> None:
    newest = await store.runs(1) if run is None else []
    record = newest[0] if newest else await store.run(run or "")
    async for kept in followed(store, record.run_id, after):
        if as_json:
            answer_json(kept.to_json())
        else:
            answer(_event_line(kept))
        sys.stdout.flush()


async def followed(
    store: "RunStore", run_id: str, after: int = 0, pause: float = FOLLOW_SECONDS
) -> "AsyncIterator[EventRecord]":
    """Yield a run's events as they come, until the last event of its last attempt, or its process is gone."""
    import anyio

    while True:
        record, attempts = await store.run(run_id), await store.attempts(run_id)
        async for kept in pages(store, run_id, after):
            after = kept.seq
            yield kept
        gone = attempts and record.status == "running" and attempts[-1].owner.alive() is False
        if record.status not in ("running", "crashed"):  # asked before the events were read: all of them are there
            return
        if gone or record.status == "crashed":
            say(f"the process of {run_id} is gone; `crucible-kitchen resume {run_id}` goes on with it")
            return
        await anyio.sleep(pause)


def _event_line(record: "EventRecord") -> str:
    fields = " ".join(f"{key}={_short(value)}" for key, value in plain(record.event.to_json()).items())
    return f"{record.seq:>6}  {clock(record.time)}  {record.event.name:<20} {fields}"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _schema(*, as_json: bool) -> None:
    from crucible_kitchen.events import event_schema

    found = event_schema()
    if as_json:
        answer_json(found)
        return
    rows = [
        (row["event"], ", ".join(row["measurements"]), ", ".join(row["metadata"]), row["doc"].partition("\n")[0])
        for row in found
    ]
    table(("event", "measurements", "metadata", "what"), rows)
