"""The commands that look at past and present runs: ``runs``, ``show``, ``events``.

They read the run store and change nothing; where there is none yet, they find it empty. Read next:
``crucible_kitchen.cli.summary``.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from crucible_kitchen.cli.console import answer, answer_json, block, plain, reporting, table
from crucible_kitchen.cli.options import DEFAULT_HOME, HomeOption, JsonOption
from crucible_kitchen.cli.summary import clock, run_facts, run_row, summary

if TYPE_CHECKING:
    from crucible_kitchen.events import EventRecord
    from crucible_kitchen.store import RunStore

__all__ = ["events", "runs", "show"]

T = TypeVar("T")

PAGE = 1000


def _read(home: Path, ask: "Callable[[RunStore], Awaitable[T]]") -> T:
    """Open the run store below a home, ask it, and close it."""
    import anyio

    from crucible_kitchen.store import MemoryRunStore, SqliteRunStore

    async def asked() -> T:
        path = home / "runs.db"
        async with SqliteRunStore(path) if path.is_file() else MemoryRunStore() as store:
            return await ask(store)

    return anyio.run(asked)


@reporting
def runs(
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="At most this many, the newest first.")
    ] = 50,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """List the runs, the newest first."""
    found = [run_row(record) for record in _read(home, lambda store: store.runs(limit))]
    if as_json:
        answer_json(found)
        return
    rows = [
        (
            row["run_id"],
            row["workflow"],
            row["status"],
            clock(row["created_at"]),
            "" if row["duration_s"] is None else f"{row['duration_s']:.1f} s",
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
            row["model"],
        )
        for row in found
    ]
    table(("run", "workflow", "status", "started", "took", "accuracy", "model"), rows)


@reporting
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of it.", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Show what a run gave and what it was."""
    facts = _read(home, lambda store: run_facts(store, run))
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
    block("config", _given(facts["config"]).items())
    block("metrics", _measured(facts["metrics"]).items())
    block("artifacts", [(a["kind"], f"{a['uri']} ({a['size']} bytes) {a['name']}") for a in facts["artifacts"]])


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
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Show the events of a run, or what events there are."""
    if schema:
        _schema(as_json=as_json)
        return
    found = _read(home, partial(_events, run=run, after=after))
    if as_json:
        answer_json([record.to_json() for record in found])
        return
    for record in found:
        answer(_event_line(record))


async def _events(store: "RunStore", *, run: str | None, after: int) -> "list[EventRecord]":
    newest = await store.runs(1) if run is None else []
    record = newest[0] if newest else await store.run(run or "")
    return [event async for event in _pages(store, record.run_id, after)]


async def _pages(store: "RunStore", run_id: str, after: int) -> "AsyncIterator[EventRecord]":
    while page := await store.read(run_id, after, PAGE):
        for record in page:
            yield record
        after = page[-1].seq


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
