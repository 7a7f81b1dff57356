"""A sink for people: a progress bar on a terminal, plain lines elsewhere, both on standard error.

It knows events and how to put them into words. Read next: ``crucible_kitchen.telemetry.sinks``.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from crucible_kitchen import events as e
from crucible_kitchen.events import EventRecord, TrainingStep
from crucible_kitchen.telemetry.sinks import RunInfo
from crucible_kitchen.workers import Lane

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["ConsoleSink"]

_REFRESH_SECONDS = 0.1


@dataclass(slots=True)
class _View:
    """What is shown of one run."""

    run: RunInfo
    seen: int = 0
    first: tuple[int, float] | None = None
    shown_at: float = float("-inf")
    refreshed_at: float = float("-inf")
    task: "TaskID | None" = None


class ConsoleSink:
    """Shows a run to a person.

    On a terminal: a progress bar with step, loss, tokens per second and the time left; everything else as lines above
    it. Elsewhere: lines only, at most one per ``interval`` seconds for the steps.

    Args:
        file: where to write; standard error if not given.
        terminal: whether that is a terminal; asked of it if not given.
        interval: least number of seconds between two lines about steps.
    """

    name = "console"

    def __init__(self, *, file: TextIO | None = None, terminal: bool | None = None, interval: float = 5.0) -> None:
        self._out = file
        self._terminal = terminal
        self._interval = interval
        self._lane = Lane("crucible-console")
        self._views: dict[str, _View] = {}
        self._console: Console | None = None
        self._progress: Progress | None = None
        self._closed = False

    async def open(self, run: RunInfo) -> None:
        """Get ready to show a run."""
        self._views.setdefault(run.run_id, _View(run))
        await self._lane.run(self._open)

    async def handle(self, records: Sequence[EventRecord]) -> None:
        """Show events; a slow terminal holds up this sink only."""
        await self._lane.run(self._show, records)

    async def aclose(self) -> None:
        """Take the progress bar away."""
        if not self._closed:
            self._closed = True
            await self._lane.run(self._stop)
            await self._lane.aclose()

    def _open(self) -> None:
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self._out or sys.stderr, force_terminal=self._terminal, highlight=False)

    def _show(self, records: Sequence[EventRecord]) -> None:
        view = self._views[records[0].run_id]
        for record in records:
            if record.seq <= view.seen:
                continue
            view.seen = record.seq
            if isinstance(record.event, TrainingStep):
                self._step(view, record.event, record.time)
            elif (words := in_words(record)) is not None:
                self._line(words)
        if records[-1].terminal:
            del self._views[view.run.run_id]
            if self._progress is not None and view.task is not None:
                self._progress.remove_task(view.task)
            if not self._views:
                self._stop()

    def _step(self, view: _View, event: TrainingStep, time: float) -> None:
        if view.first is None:
            view.first = (event.step, time)
        assert self._console is not None
        if self._console.is_terminal:
            self._advance(view, event, time)
        elif time - view.shown_at >= self._interval or event.step == event.total_steps:
            view.shown_at = time
            self._line(step_in_words(event, _seconds_left(event, view.first, time)))

    def _advance(self, view: _View, event: TrainingStep, time: float) -> None:
        progress = self._progress = self._progress or self._make_progress()
        total = event.total_steps or None
        if view.task is None:
            view.task = progress.add_task(view.run.workflow, total=total, figures="")
        left = _seconds_left(event, view.first, time)
        figures = f"epoch {event.epoch}  loss {event.loss:.4g}  {event.tokens_per_sec:,.0f} tok/s{_eta(left)}"
        progress.update(view.task, completed=event.step, total=total, figures=figures)
        if time - view.refreshed_at >= _REFRESH_SECONDS or event.step == event.total_steps:
            view.refreshed_at = time
            progress.refresh()

    def _make_progress(self) -> "Progress":
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        # It refreshes when events come: a thread of its own would outlive a sink that nobody closes.
        progress = Progress(
            *columns, console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        progress.start()
        return progress

    def _line(self, words: str) -> None:
        assert self._console is not None
        self._console.print(words, markup=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.file.flush()

    def _stop(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()


def step_in_words(event: TrainingStep, seconds_left: float | None) -> str:
    """Return a training step as one line."""
    of = f"/{event.total_steps}" if event.total_steps else ""
    return (
        f"step {event.step}{of}  epoch {event.epoch}  loss {event.loss:.4g}  lr {event.lr:.3g}  "
        f"grad norm {event.grad_norm:.3g}  {event.tokens_per_sec:,.0f} tok/s{_eta(seconds_left)}"
    )


def _seconds_left(event: TrainingStep, first: tuple[int, float] | None, time: float) -> float | None:
    """Return the time the remaining steps take at the mean speed so far, in seconds; None where it is not known."""
    if first is None or not event.total_steps or event.step <= first[0]:
        return None
    return (event.total_steps - event.step) * (time - first[1]) / (event.step - first[0])


def _eta(seconds: float | None) -> str:
    return "" if seconds is None else f"  ETA {timedelta(seconds=round(seconds))}"


def in_words(record: EventRecord) -> str | None:
    """Return an event as one line for people, or None for those that only machines want."""
    speak = _WORDS.get(type(record.event))
    return None if speak is None else speak(record, record.event)


def _stop_words(record: EventRecord, event: e.WorkflowStop) -> str:
    where = (event.error or {}).get("where")  # the error itself was told by its stage, and is by whoever waits
    return f"run {record.run_id} {event.status} after {event.duration_s:.1f} s" + (f" at {where}" if where else "")


def _data_words(_: EventRecord, event: e.DataPrepared) -> str:
    cut = f", {event.truncated} rows truncated" if event.truncated else ""
    return (
        f"dataset {event.dataset}: {event.rows:,} rows, {event.tokens:,} tokens, {event.trained_tokens:,} trained on"
        f"{cut}; {event.steps:,} steps"
    )


def _eval_words(_: EventRecord, event: e.EvalComplete) -> str:
    label = f" ({event.label})" if event.label else ""
    return (
        f"evaluation{label} at step {event.step}: accuracy {event.accuracy:.3f}  f1 {event.f1:.3f}  "
        f"precision {event.precision:.3f}  recall {event.recall:.3f}  on {event.sample_count:,} held-out rows"
    )


def _preference_words(_: EventRecord, event: e.DpoEvaluated) -> str:
    label = f" ({event.label})" if event.label else ""
    return (
        f"evaluation{label} at step {event.step}: accuracy {event.accuracy:.3f}  loss {event.loss:.4g}  "
        f"margin {event.margin:.3g}  on {event.num_pairs:,} held-out comparisons"
    )


_WORDS: dict[type[e.Event], Callable[[EventRecord, Any], str]] = {
    e.WorkflowStart: lambda record, event: f"run {record.run_id} of {event.recipe} started",
    e.WorkflowStop: _stop_words,
    e.StageErrored: lambda _, event: (
        f"stage {event.path} failed, attempt {event.attempt} ({event.code}): {event.message}; {event.action}"
    ),
    e.DataPrepared: _data_words,
    e.TrainingEpoch: lambda _, event: (
        f"epoch {event.epoch} ended: mean loss {event.avg_loss:.4g} over {event.steps:,} steps"
    ),
    e.TrainingCheckpoint: lambda _, event: f"checkpoint of step {event.step} saved",
    e.EvalComplete: _eval_words,
    e.DpoEvaluated: _preference_words,
    e.ModelRegistered: lambda _, event: f"registered {event.model_name}:{event.version} ({event.uri})",
    e.WarningRaised: lambda _, event: f"warning: {event.message}",
}
