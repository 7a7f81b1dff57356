"""The commands that run and check: ``run``, ``resume`` and ``validate``.

A run ends with an exit code that agrees with the run store: 0 completed, 1 failed, 2 bad usage or failed validation,
75 paused, 130 cancelled. Read next: ``crucible_kitchen.kitchen``.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import anyio
import anyio.abc
import typer

from crucible_kitchen.cli.console import (
    BAD_USAGE,
    CANCELLED,
    COMPLETED,
    FAILED,
    PAUSED,
    USAGE,
    answer,
    answer_json,
    error_facts,
    failure_json,
    known_error,
    report,
    reporting,
    say,
)
from crucible_kitchen.cli.options import (
    DEFAULT_HOME,
    AdapterOption,
    ConfigOption,
    DebugOption,
    HomeOption,
    JsonlOption,
    JsonOption,
    MetricsHostOption,
    MetricsPortOption,
    QuietOption,
    TargetArgument,
    TensorboardOption,
    Values,
)
from crucible_kitchen.cli.summary import run_facts, summary
from crucible_kitchen.errors import ConfigError, CrucibleError, RunCancelled

if TYPE_CHECKING:
    from crucible_kitchen.kitchen import Kitchen
    from crucible_kitchen.runs import RunHandle
    from crucible_kitchen.telemetry import Sink

__all__ = ["resume", "run", "validate"]

EXIT_CODES = {"completed": COMPLETED, "failed": FAILED, "paused": PAUSED, "cancelled": CANCELLED}
ONE_SIGNAL_SECONDS = 0.2
"""Signals closer together than this are one: a terminal and a parent process may both send it."""

RUN_KEYS = ("run_id", "status", "state", "metrics", "artifacts", "duration_s")


class Order(Protocol):
    """What a person asked to have run."""

    async def begin(self, kitchen: "Kitchen") -> "RunHandle":
        """Begin it in an open kitchen."""
        ...


@dataclass
class Start:
    """A new run: the arguments of ``Kitchen.start``."""

    target: Any
    config: dict[str, Any]
    adapters: dict[str, Any]
    place: str

    async def begin(self, kitchen: "Kitchen") -> "RunHandle":
        """Start it."""
        return await kitchen.start(self.target, self.config, adapters=self.adapters, place=self.place)


@dataclass
class Again:
    """Another attempt of a run: the arguments of ``Kitchen.reopen``, as they were given."""

    run: str
    values: list[str]
    adapters: list[str]
    allow_changed: list[str]

    async def begin(self, kitchen: "Kitchen") -> "RunHandle":
        """Find the workflow where it was found the first time, and go on."""
        from crucible_kitchen.cli import given

        record = await kitchen.store.run(self.run)
        manifest = await kitchen.store.manifest(record.run_id) or {}
        found = given.target(kitchen.registry, str(manifest.get("target", record.workflow)))
        config = given.config_values(given.config_class(found), self.values, None)
        return await kitchen.reopen(
            record.run_id,
            config,
            target=found,
            adapters=given.adapters(kitchen.registry, self.adapters),
            allow_changed=self.allow_changed,
        )


@dataclass(frozen=True)
class Ended:
    """How a run ended; ``run_id`` is None if it did not begin."""

    run_id: str | None
    status: str
    error: CrucibleError | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """The exit code of the process."""
        if self.run_id is None and isinstance(self.error, BAD_USAGE):
            return USAGE
        return EXIT_CODES.get(self.status, FAILED)

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        known = {key: self.facts[key] for key in RUN_KEYS if key in self.facts}
        if self.error is None:
            return known
        return known | failure_json(error_facts(self.error), run_id=self.run_id, status=self.status)


class Interrupt:
    """Signals during a run: SIGTERM stops it at a checkpoint, SIGINT cancels it; a second one ends the process."""

    def __init__(self) -> None:
        self.starting = anyio.CancelScope()
        self.handle: RunHandle | None = None

    async def watch(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Wait for signals; cancelled when the run has ended."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async with anyio.create_task_group() as group:
                first = await anext(signals)
                drains = first is signal.SIGTERM and self.handle is not None
                does = "stopping the run at a checkpoint" if drains else "cancelling the run and cleaning up"
                say(f"{first.name}: {does}; once more ends it at once")
                if self.handle is None:
                    self.starting.cancel()
                else:
                    group.start_soon(self.handle.drain if drains else self.handle.cancel)
                since = time.monotonic()
                async for _ in signals:
                    if time.monotonic() - since > ONE_SIGNAL_SECONDS:
                        end_at_once()


def end_at_once() -> None:
    """Leave without any clean-up."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
    sys.stderr.write("ended at once; what was saved is kept\n")
    sys.stderr.flush()
    os._exit(CANCELLED)


@reporting
def run(
    target: TargetArgument,
    values: Values = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    home: HomeOption = DEFAULT_HOME,
    metrics_port: MetricsPortOption = None,
    metrics_host: MetricsHostOption = "127.0.0.1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, run nothing.")] = False,
    as_json: JsonOption = False,
    jsonl: JsonlOption = None,
    tensorboard: TensorboardOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a workflow or recipe to its end.

    Ctrl-C cancels it, with its clean-up; SIGTERM stops it at a checkpoint. Either way, and also if it fails or the
    machine does, `crucible-kitchen resume` goes on with it. A second signal ends it at once. Exit codes: 0 completed,
    1 failed, 2 bad usage or failed validation, 75 paused, 130 cancelled.
    """
    order = understood(target, values, config, adapter)
    if dry_run:
        checked(order, home, as_json=as_json)
        return
    from crucible_kitchen.kitchen import Kitchen

    sinks = chosen_sinks(jsonl, tensorboard, quiet=quiet)
    kitchen = Kitchen(home=home, sinks=sinks, metrics_port=metrics_port, metrics_host=metrics_host)
    carried_out(kitchen, order, home, as_json=as_json, quiet=quiet, debug=debug)


@reporting
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or the beginning of it.")],
    values: Values = None,
    adapter: AdapterOption = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changed",
            metavar="FIELD",
            help="Go on although this differs: a config key, dataset, workflow, code, a package or a port.",
        ),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    metrics_port: MetricsPortOption = None,
    metrics_host: MetricsHostOption = "127.0.0.1",
    as_json: JsonOption = False,
    jsonl: JsonlOption = None,
    tensorboard: TensorboardOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Go on with a run that did not complete, whatever ended it.

    What is done is not done again: training returns to the newest checkpoint, and on a reproducible backend the run
    ends with the same weights as if nothing had happened. Config, dataset, code and versions must be those it began
    with, unless --allow-changed names what may differ. Exit codes as for `run`.
    """
    from crucible_kitchen.kitchen import Kitchen

    order = Again(run, values or [], adapter or [], allow_changed or [])
    sinks = chosen_sinks(jsonl, tensorboard, quiet=quiet)
    kitchen = Kitchen(home=home, sinks=sinks, metrics_port=metrics_port, metrics_host=metrics_host)
    carried_out(kitchen, order, home, as_json=as_json, quiet=quiet, debug=debug)


def carried_out(kitchen: "Kitchen", order: Order, home: Path, *, as_json: bool, quiet: bool, debug: bool) -> None:
    """Run an order to its end, tell how it ended, and leave with its exit code."""
    ended = anyio.run(partial(to_its_end, kitchen, order))
    if ended.error is not None:
        report(ended.error, debug=debug)
    if as_json:
        answer_json(ended.to_json())
    elif ended.run_id is not None:
        heard = not quiet and sys.stdout.isatty()  # the progress on the same terminal ended with the first line
        for line in summary(ended.facts, home)[1 if heard else 0 :]:
            answer(line)
    if ended.exit_code:
        raise typer.Exit(ended.exit_code)


@reporting
def validate(
    target: TargetArgument,
    values: Values = None,
    config: ConfigOption = None,
    adapter: AdapterOption = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Check a run without running it; the same as `run --dry-run`."""
    checked(understood(target, values, config, adapter), home, as_json=as_json)


def understood(target: str, values: list[str] | None, file: Path | None, adapter: list[str] | None) -> Start:
    """Return what the arguments ask for.

    Raises:
        ConfigError, AdapterError, NotFoundError, WorkflowError: what is wrong with them.
    """
    from crucible_kitchen.cli import given
    from crucible_kitchen.registry import Registry

    registry = Registry.discover()
    found = given.target(registry, target)
    settings = given.config_values(given.config_class(found), values or [], file)
    return Start(found, settings, given.adapters(registry, adapter or []), target)


def checked(order: Start, home: Path, *, as_json: bool) -> None:
    """Check an order and say that it is in order.

    Raises:
        ConfigError, WorkflowError, AdapterError: all that is wrong with it.
    """
    from crucible_kitchen.kitchen import Kitchen

    result = Kitchen(home=home).check(order.target, order.config, adapters=order.adapters)
    if as_json:
        answer_json(result.to_json() | {"manifest": result.manifest})
        return
    answer(f"{order.target.name} can run: workflow, config and adapters fit")
    for port, adapter in result.manifest["adapters"].items():
        answer(f"  {port:<16} {adapter['class'].rpartition('.')[2]}")
    repeats = "yes" if result.manifest["reproducible"] else "no"
    answer(f"  {'reproducible':<16} {repeats}: {result.manifest['reproducible_because']}")


def chosen_sinks(jsonl: Path | None, tensorboard: Path | None, *, quiet: bool) -> "list[Sink]":
    """Return the sinks asked for.

    Raises:
        ConfigError: the file cannot be written; better said now than after training.
        MissingExtra: TensorBoard is not installed.
    """
    from crucible_kitchen.telemetry import ConsoleSink, JsonlSink, TensorBoardSink

    sinks: list[Sink] = [] if quiet else [ConsoleSink()]
    if jsonl is not None:
        writable(jsonl, "--jsonl")
        sinks.append(JsonlSink(jsonl))
    if tensorboard is not None:
        needs_tensorboard()
        sinks.append(TensorBoardSink(tensorboard))
    return sinks


def writable(path: Path, option: str) -> None:
    """Make sure that a file can be appended to.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint=f"give {option} another file") from error


def needs_tensorboard() -> None:
    """Make sure that TensorBoard is installed.

    Raises:
        MissingExtra: it is not.
    """
    from importlib.util import find_spec

    from crucible_kitchen.errors import MissingExtra

    if find_spec("tensorboard") is None:
        raise MissingExtra("tensorboard", "tensorboard")


async def to_its_end(kitchen: "Kitchen", order: Order) -> Ended:
    """Run an order to its end, whatever that is; raises nothing."""
    interrupt = Interrupt()
    ended = Ended(None, "cancelled", RunCancelled("cancelled before the run began"))
    async with anyio.create_task_group() as group:
        await group.start(interrupt.watch)
        with interrupt.starting:
            try:
                ended = await in_kitchen(kitchen, order, interrupt)
            except Exception as error:  # noqa: BLE001 - reported as the run's end, with its exit code
                run_id = interrupt.handle.id if interrupt.handle else None
                ended = Ended(run_id, "failed", known_error(error), {"run_id": run_id, "status": "failed"})
        group.cancel_scope.cancel()
    return ended


async def in_kitchen(kitchen: "Kitchen", order: Order, interrupt: Interrupt) -> Ended:
    """Open the kitchen, run the order and close everything again."""
    async with kitchen:
        handle = interrupt.handle = await order.begin(kitchen)
        if kitchen.metrics_port is not None:
            say(f"metrics are served on port {kitchen.metrics_port}, path /metrics")
        error: CrucibleError | None = None
        try:
            await handle.wait()
        except Exception as failure:  # noqa: BLE001 - a run may end with any error of an adapter
            error = known_error(failure)
        return Ended(handle.id, handle.status, error, await facts_of(kitchen, handle))


async def facts_of(kitchen: "Kitchen", handle: "RunHandle") -> dict[str, Any]:
    """Return what the store knows of a run that ended, or only its end if the store itself is broken."""
    try:
        return await run_facts(kitchen.store, handle.id) | {"status": handle.status}  # a full disk records no end
    except CrucibleError:
        return {"run_id": handle.id, "status": handle.status}
