"""The commands on the list of runs: ``runs`` and ``runs prune``.

``runs`` changes nothing. ``runs prune`` says what it will delete before it does, and keeps whatever somebody still
runs. Read next: ``crucible_kitchen.cli.reading``.
"""

import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from crucible_kitchen.cli.console import answer, answer_json, reporting, say, table
from crucible_kitchen.cli.options import DEFAULT_HOME, HomeOption, JsonOption
from crucible_kitchen.cli.reading import read
from crucible_kitchen.cli.summary import clock, run_row
from crucible_kitchen.errors import ConfigError, RunLive

if TYPE_CHECKING:
    from crucible_kitchen.store import RunRecord, RunStore

__all__ = ["runs"]

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

StatusOption = Annotated[
    str | None,
    typer.Option("--status", metavar="STATUS", help="running, completed, failed, cancelled, paused or crashed."),
]
WorkflowOption = Annotated[
    str | None, typer.Option("--workflow", metavar="NAME", help="Only runs of this workflow or recipe.")
]

runs = typer.Typer(help="List the runs, the newest first.", invoke_without_command=True)


@runs.callback()
@reporting
def list_runs(
    context: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="At most this many, the newest first.")
    ] = 50,
    status: StatusOption = None,
    workflow: WorkflowOption = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="WHEN", help="Only runs begun since then: `2h`, `3d`, or an ISO date."),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """List the runs, the newest first; `runs prune` deletes some."""
    if context.invoked_subcommand is not None:
        return
    began = None if since is None else moment(since, "--since")
    asked: Any = known_status(status)
    found = [run_row(record) for record in read(home, lambda store: store.runs(limit, asked, workflow, began))]
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


@runs.command("prune")
@reporting
def prune(
    run: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs to delete, by their ids or beginnings of them.")
    ] = None,
    status: StatusOption = None,
    workflow: WorkflowOption = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Only runs begun before then: `30d`, `12h`, or an ISO date."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Delete runs: their records, logs, checkpoints and directories.

    What will be deleted is said first; without --yes it is asked for, and nothing happens where nobody can answer. Runs
    that somebody still has are kept. Weights and reports in the blob store stay: they are kept by their content, and
    registered models and other runs may refer to them.
    """
    if not (run or status or workflow or older_than):
        hint = "name runs, or give --status, --workflow or --older-than"
        raise ConfigError("nothing says which runs to delete", hint=hint)
    before = None if older_than is None else moment(older_than, "--older-than")
    plans = read(home, lambda store: planned(store, home, run or (), known_status(status), workflow, before))
    if not as_json:
        for plan in plans:
            answer(plan.says())
        answer(f"{len([p for p in plans if not p.live])} runs, {sum(p.size for p in plans if not p.live):,} bytes")
    doomed = [plan for plan in plans if not plan.live]
    if not doomed or not (yes or _agreed()):
        if as_json:
            answer_json({"deleted": [], "kept": [plan.run_id for plan in plans]})
        return
    deleted = read(home, lambda store: carried_out(store, doomed))
    if as_json:
        answer_json({"deleted": deleted, "kept": [p.run_id for p in plans if p.run_id not in deleted]})
        return
    answer(f"deleted {len(deleted)} runs; what they stored in {home / 'blobs'} stays")


@dataclass(frozen=True)
class Plan:
    """One run that is asked to be deleted.

    Attributes:
        size: bytes in its directory.
        live: somebody still has it: it is kept.
    """

    run_id: str
    workflow: str
    status: str
    created_at: float
    directory: Path
    size: int
    live: bool

    def says(self) -> str:
        """Return what becomes of it, as a line."""
        does = "keep, it runs" if self.live else "delete"
        size = "" if self.live else f", {self.size:,} bytes in {self.directory}"
        return f"{does}: {self.run_id} {self.workflow} {self.status} {clock(self.created_at)}{size}"


async def planned(
    store: "RunStore", home: Path, named: Sequence[str], status: Any, workflow: str | None, before: float | None
) -> list[Plan]:
    """Return what is to become of the runs that are asked for, the newest first.

    Raises:
        RunNotFound: a run that is named is not there.
    """
    ids = {(await store.run(name)).run_id for name in named}
    found = await store.runs(None, status, workflow, None, before)
    return [await _plan(store, home, record) for record in found if not named or record.run_id in ids]


async def _plan(store: "RunStore", home: Path, record: "RunRecord") -> Plan:
    directory = home / "runs" / record.run_id
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    attempts = await store.attempts(record.run_id)
    live = record.status == "running" and bool(attempts) and attempts[-1].owner.alive() is not False
    return Plan(record.run_id, record.workflow, record.status, record.created_at, directory, size, live)


async def carried_out(store: "RunStore", plans: Sequence[Plan]) -> list[str]:
    """Delete runs, the records first, and return the ids of those that are gone."""
    from crucible_kitchen.workers import run_sync

    deleted = []
    await store.reconcile()
    for plan in plans:
        try:
            await store.delete_run(plan.run_id)
        except RunLive:
            say(f"{plan.run_id} is kept: it runs again")
            continue
        await run_sync(shutil.rmtree, plan.directory, ignore_errors=True)
        deleted.append(plan.run_id)
    return deleted


def _agreed() -> bool:
    """Ask whether to go on; where nobody can answer, the answer is no."""
    if not sys.stdin.isatty():
        say("nothing was deleted: say --yes to delete it")
        return False
    return typer.confirm("Delete them?", err=True)


def moment(text: str, option: str) -> float:
    """Return the time that an age or an ISO date means, in seconds since the epoch.

    Raises:
        ConfigError: it is neither.
    """
    if age := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return time.time() - float(age[1]) * UNITS[age[2]]
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        raise ConfigError(
            f"{option}: {text!r} is no time", hint="write an age like 30m, 2h, 3d, or a date like 2026-11-25"
        ) from None


def known_status(status: str | None) -> str | None:
    """Return a status if there is such a one.

    Raises:
        ConfigError: there is not.
    """
    from crucible_kitchen.store import RunStatus

    if status is not None and status not in get_args(RunStatus):
        raise ConfigError(f"--status: there is no status {status!r}", hint=f"one of {', '.join(get_args(RunStatus))}")
    return status
