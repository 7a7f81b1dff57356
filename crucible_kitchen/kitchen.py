"""The kitchen: the composition root, and the only place that knows ports, adapters, store and sinks by name.

Values flow one way through it: config, kitchen, workflow, stage, port, adapter, result. Read next:
``crucible_kitchen.runs``, ``crucible_kitchen.workflow.engine``.
"""

import os
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import RunChanged, StorageFull, StoreError
from crucible_kitchen.history import History
from crucible_kitchen.manifest import differences
from crucible_kitchen.plans import DEFAULT_ADAPTERS, AdapterChoice, Plan, Planner, Target, chosen_before
from crucible_kitchen.registry import Registry
from crucible_kitchen.runs import RunHandle, RunResult
from crucible_kitchen.store import Lease, RunRecord, RunStore, SqliteRunStore
from crucible_kitchen.telemetry import EventLog, MetricsServer, PrometheusSink, RunInfo, Sink, pump, serve_metrics
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import RunContext, StateView

__all__ = ["AdapterChoice", "Kitchen", "run"]

NOT_OPEN = "open the kitchen first: `async with Kitchen() as kitchen:`"


def default_home() -> Path:
    """Return the directory that state lives in: ``CRUCIBLE_HOME``, or ``.crucible`` below the current one."""
    return Path(os.environ.get("CRUCIBLE_HOME", ".crucible")).absolute()


class Kitchen:
    """Runs workflows.

    Without arguments it uses the embedded adapters and needs no service, account or network. What belongs to it
    (store, adapters, metrics server, runs still going) ends with ``async with``; ``await Kitchen().run(...)`` alone
    opens and closes it by itself.

    Args:
        adapters: adapter by port; what is not given is the embedded default.
        home: directory for runs, blobs and the registry.
        sinks: where events go besides the run's log; they are closed with the kitchen.
        metrics_port: serve Prometheus metrics on this port; 0 takes a free one.
        metrics_host: the interface they are served on; loopback unless said.
        registry: names known; unset: what the installed packages offer.
        store: where runs are kept; unset: ``runs.db`` in ``home``. It is opened and closed with the kitchen.

    Example::

        async with Kitchen(metrics_port=9100) as kitchen:
            run = await kitchen.start("supervised", {"model": "tiny", "dataset": "sums"})
            async for record in run.events():
                print(record.seq, record.event)
            result = await run.wait()
    """

    def __init__(
        self,
        adapters: Mapping[str, AdapterChoice] | None = None,
        *,
        home: Path | str | None = None,
        sinks: Sequence[Sink] = (),
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        registry: Registry | None = None,
        store: RunStore | None = None,
    ) -> None:
        self._choices = {**DEFAULT_ADAPTERS, **(adapters or {})}
        self._home = Path(home).absolute() if home is not None else default_home()
        self._sinks = tuple(sinks)
        self._open_sinks: list[Sink] = []
        self._metrics_port = metrics_port
        self._metrics_host = metrics_host
        self._registry = registry
        self._given_store = store
        self._store: RunStore | None = None
        self._built: dict[str, Any] = {}
        self._stack: AsyncExitStack | None = None
        self._group: anyio.abc.TaskGroup
        self._metrics: MetricsServer | None = None

    @property
    def registry(self) -> Registry:
        """The names known to this kitchen."""
        if self._registry is None:
            self._registry = Registry.discover()
        return self._registry

    @property
    def home(self) -> Path:
        """The directory that state lives in."""
        return self._home

    @property
    def store(self) -> RunStore:
        """The run store; it is there inside ``async with`` only."""
        if self._store is None:
            raise RuntimeError(NOT_OPEN)
        return self._store

    @property
    def metrics_port(self) -> int | None:
        """The port that ``/metrics`` is served on, or None."""
        return self._metrics.port if self._metrics else None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await run_sync(_make_directory, self._home)
            self._store = self._given_store or SqliteRunStore(self._home / "runs.db")
            await stack.enter_async_context(self._store)
            await self._store.reconcile()  # what a process that is gone left running is called crashed
            stack.push_async_callback(self._close_parts)
            self._open_sinks = list(self._sinks)
            if self._metrics_port is not None:
                prometheus = PrometheusSink()
                self._metrics = await serve_metrics(prometheus.registry, self._metrics_port, self._metrics_host)
                stack.push_async_callback(self._metrics.aclose)
                self._open_sinks.append(prometheus)
            self._group = await stack.enter_async_context(anyio.create_task_group())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        try:
            return await stack.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as group:
            if error is not None and group.exceptions == (error,):
                return False  # the block's own error, which the task group wrapped: it is raised as it was
            raise

    async def _close_parts(self) -> None:
        """Close sinks and adapters, newest first; the store stays open until they are."""
        with anyio.CancelScope(shield=True):
            for part in (*self._open_sinks, *reversed(self._built.values())):
                await part.aclose()
            self._built = {}

    async def run(
        self,
        target: Target,
        config: Mapping[str, Any] | RunConfig | None = None,
        *,
        adapters: Mapping[str, AdapterChoice] | None = None,
        dry_run: bool = False,
    ) -> RunResult:
        """Run a workflow to its end and return its result.

        Args:
            target: the name of a workflow or recipe, or one itself.
            config: its config, as values by key or built already.
            adapters: for this run only, over the kitchen's.
            dry_run: check everything that can be checked without training, call no adapter, and return.

        Raises:
            ConfigError, WorkflowError, AdapterError: before anything ran.
            CrucibleError: the failure that ended the run.
        """
        if dry_run:
            return self.check(target, config, adapters=adapters)
        if self._stack is None:
            async with self:
                return await self._run(target, config, adapters)
        return await self._run(target, config, adapters)

    async def _run(
        self,
        target: Target,
        config: Mapping[str, Any] | RunConfig | None,
        adapters: Mapping[str, AdapterChoice] | None,
    ) -> RunResult:
        return await _to_its_end(await self.start(target, config, adapters=adapters))

    async def resume(
        self,
        run_id: str,
        config: Mapping[str, Any] | None = None,
        *,
        target: Target | None = None,
        adapters: Mapping[str, AdapterChoice] | None = None,
        allow_changed: Collection[str] = (),
    ) -> RunResult:
        """Go on with a run that failed, crashed, was cancelled or paused, to its end; see :meth:`reopen`."""
        if self._stack is None:
            async with self:
                again = await self.reopen(run_id, config, target=target, adapters=adapters, allow_changed=allow_changed)
                return await _to_its_end(again)
        return await _to_its_end(
            await self.reopen(run_id, config, target=target, adapters=adapters, allow_changed=allow_changed)
        )

    def check(
        self,
        target: Target,
        config: Mapping[str, Any] | RunConfig | None = None,
        *,
        adapters: Mapping[str, AdapterChoice] | None = None,
    ) -> RunResult:
        """Check a run without starting it; no adapter is called and no file written.

        Raises:
            ConfigError, WorkflowError, AdapterError: what is wrong, all of it.
        """
        plan = self._planner({}).plan(target, config, adapters)
        return RunResult("", "validated", StateView({}), {}, (), plan.manifest, 0.0)

    def _planner(self, shared: dict[str, Any]) -> Planner:
        return Planner(self.registry, self._choices, self._home, shared)

    def _must_be_open(self) -> None:
        if self._stack is None:
            raise RuntimeError(NOT_OPEN)

    async def start(
        self,
        target: Target,
        config: Mapping[str, Any] | RunConfig | None = None,
        *,
        adapters: Mapping[str, AdapterChoice] | None = None,
        place: str | None = None,
    ) -> RunHandle:
        """Start a run and return its handle; the kitchen must be open (``async with``).

        Args:
            target: the name of a workflow or recipe, or one itself.
            config: its config, as values by key or built already.
            adapters: for this run only, over the kitchen's.
            place: where the target can be found again, if not by its name: ``file.py:attribute``.

        Raises:
            ConfigError, WorkflowError, AdapterError: before anything ran.
        """
        self._must_be_open()
        plan = self._planner(self._built).plan(target, config, adapters, place)
        run_id = new_run_id()
        directory = self._home / "runs" / run_id
        await run_sync(_make_directory, directory)
        manifest = plan.manifest
        record = RunRecord(
            run_id=run_id,
            workflow=plan.recipe,
            config=manifest["config"],
            config_hash=manifest["config_hash"],
            created_at=time.time(),
        )
        lease = await self.store.create_run(record, manifest=manifest)
        log = EventLog(run_id, self.store)
        context = RunContext(run_id, plan.recipe, plan.config.seed, directory, log, manifest)
        context.memory = History(lease, self.store, log)
        return self._go(plan, context, log, lease)

    async def reopen(
        self,
        run_id: str,
        config: Mapping[str, Any] | None = None,
        *,
        target: Target | None = None,
        adapters: Mapping[str, AdapterChoice] | None = None,
        allow_changed: Collection[str] = (),
    ) -> RunHandle:
        """Begin the next attempt of a run and return its handle; the kitchen must be open (``async with``).

        What is recorded is not run again; sessions return to their newest checkpoint.

        Args:
            run_id: the run's id, or the beginning of it.
            config: values that are to differ from those the run began with; each must be allowed.
            target: the workflow or recipe, where it cannot be found by its name.
            adapters: as for :meth:`start`; unset: those the run began with.
            allow_changed: what may differ: config keys, ``dataset``, ``workflow``, ``code``, packages, ports.

        Raises:
            RunNotFound, RunLive, RunEnded: it cannot go on.
            RunChanged: it would not be the same run, and nobody allowed that.
        """
        self._must_be_open()
        record = await self.store.run(run_id)
        manifest = await self.store.manifest(record.run_id)
        if manifest is None:
            raise StoreError(
                f"the run {record.run_id} has no manifest, so it cannot be resumed", hint="start a new run"
            )
        values = {**manifest["config"], **(config or {})}
        choices = {**chosen_before(manifest), **(adapters or {})}
        plan = self._planner(self._built).plan(target or manifest["target"], values, choices, manifest["target"])
        changed = differences(manifest, plan.manifest)
        if refused := {name: pair for name, pair in changed.items() if name not in allow_changed}:
            raise RunChanged(record.run_id, refused)
        directory = self._home / "runs" / record.run_id
        await run_sync(_make_directory, directory)
        allowed = frozenset({*allow_changed, *manifest.get("changed", ())})
        manifest = {**plan.manifest, "changed": sorted(allowed)}
        lease = await self.store.open_attempt(record.run_id, manifest=manifest)
        log = EventLog(record.run_id, self.store, start=lease.seq)
        context = RunContext(record.run_id, plan.recipe, plan.config.seed, directory, log, manifest, allowed=allowed)
        context.memory = await History.found(lease, self.store, log)
        return self._go(plan, context, log, lease)

    def _go(self, plan: Plan, context: RunContext, log: EventLog, lease: Lease) -> RunHandle:
        closing = AsyncExitStack()
        for adapter in plan.own:
            closing.push_async_callback(adapter.aclose)
        handle = RunHandle(plan.workflow, plan.config, plan.adapters, context, log, lease)
        info = RunInfo(context.id, plan.recipe, dict(context.manifest))
        for sink in self._open_sinks:
            self._group.start_soon(pump, sink, info, log)
        self._group.start_soon(handle.attempt, self.store, closing)
        return handle


async def _to_its_end(handle: RunHandle) -> RunResult:
    """Wait for a run; a caller that is cancelled takes it along."""
    try:
        return await handle.wait()
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            await handle.cancel()
        raise


def new_run_id() -> str:
    """Return a new run id: sortable by time, unique without asking anyone."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFull(
            f"cannot create {path}: {error.strerror}", hint="give another directory: --home DIR"
        ) from error


def run(
    target: Target,
    config: Mapping[str, Any] | RunConfig | None = None,
    *,
    adapters: Mapping[str, AdapterChoice] | None = None,
    home: Path | str | None = None,
    dry_run: bool = False,
) -> RunResult:
    """Run a workflow from synchronous code: a script, a notebook cell without a running loop.

    See :meth:`Kitchen.run`.
    """
    return anyio.run(partial(Kitchen(home=home).run, target, config, adapters=adapters, dry_run=dry_run))
