"""The kitchen: the composition root, and the only place that knows ports, adapters, store and sinks by name.

Values flow one way through it: config, kitchen, workflow, stage, port, adapter, result. Read next:
``crucible_kitchen.runs``, ``crucible_kitchen.workflow.engine``.
"""

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import anyio
import anyio.abc

from crucible_kitchen.config import RunConfig, build_config
from crucible_kitchen.errors import AdapterError, StorageFull
from crucible_kitchen.manifest import build_manifest
from crucible_kitchen.ports import PORTS
from crucible_kitchen.registry import Registry
from crucible_kitchen.runs import RunHandle, RunResult
from crucible_kitchen.store import RunRecord, RunStore, SqliteRunStore
from crucible_kitchen.telemetry import EventLog, MetricsServer, PrometheusSink, RunInfo, Sink, pump, serve_metrics
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.check import check, ports_of
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.recipe import Recipe
from crucible_kitchen.workflow.run import RunContext, StateView

__all__ = ["AdapterChoice", "Kitchen", "run"]

AdapterChoice: TypeAlias = Any
"""A registered name, a pair of name and options, an instance, or None for none."""

DEFAULT_ADAPTERS: Mapping[str, str] = {
    "training_client": "torch",
    "dataset_store": "files",
    "evaluator": "metrics",
    "model_registry": "sqlite",
    "blob_store": "files",
    "llm_client": "noop",
}


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
            raise RuntimeError("open the kitchen first: `async with Kitchen() as kitchen:`")
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
        target: str | Workflow | Recipe,
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
        target: str | Workflow | Recipe,
        config: Mapping[str, Any] | RunConfig | None,
        adapters: Mapping[str, AdapterChoice] | None,
    ) -> RunResult:
        handle = await self.start(target, config, adapters=adapters)
        try:
            return await handle.wait()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await handle.cancel()
            raise

    def check(
        self,
        target: str | Workflow | Recipe,
        config: Mapping[str, Any] | RunConfig | None = None,
        *,
        adapters: Mapping[str, AdapterChoice] | None = None,
    ) -> RunResult:
        """Check a run without starting it; no adapter is called and no file written.

        Raises:
            ConfigError, WorkflowError, AdapterError: what is wrong, all of it.
        """
        recipe, workflow, settings = self._resolve(target, config)
        chosen, _ = self._adapters(target, workflow, adapters, {})
        check(workflow, adapters=chosen, config=settings)
        manifest = build_manifest(workflow, recipe, settings, chosen)
        return RunResult("", "validated", StateView({}), {}, (), manifest, 0.0)

    async def start(
        self,
        target: str | Workflow | Recipe,
        config: Mapping[str, Any] | RunConfig | None = None,
        *,
        adapters: Mapping[str, AdapterChoice] | None = None,
    ) -> RunHandle:
        """Start a run and return its handle; the kitchen must be open (``async with``).

        Raises:
            ConfigError, WorkflowError, AdapterError: before anything ran.
        """
        if self._stack is None:
            raise RuntimeError("open the kitchen first: `async with Kitchen() as kitchen:`")
        recipe, workflow, settings = self._resolve(target, config)
        chosen, own = self._adapters(target, workflow, adapters, self._built)
        check(workflow, adapters=chosen, config=settings)
        closing = AsyncExitStack()
        for adapter in own:
            closing.push_async_callback(adapter.aclose)
        context, log = await self._begin(recipe, workflow, settings, chosen)
        handle = RunHandle(workflow, settings, chosen, context, log)
        info = RunInfo(context.id, recipe, dict(context.manifest))
        for sink in self._open_sinks:
            self._group.start_soon(pump, sink, info, log)
        self._group.start_soon(handle.attempt, self.store, closing)
        return handle

    # -- composition ----------------------------------------------------------------------------------------------

    def _resolve(
        self, target: str | Workflow | Recipe, config: Mapping[str, Any] | RunConfig | None
    ) -> tuple[str, Workflow, RunConfig]:
        """Return the name, the workflow and the config of a run."""
        found = self.registry.target(target) if isinstance(target, str) else target
        workflow = found.workflow if isinstance(found, Recipe) else found
        if isinstance(config, RunConfig):
            return found.name, workflow, config
        values = dict(config or {})
        settings = found.config(values) if isinstance(found, Recipe) else build_config(workflow.config, values)
        return found.name, workflow, settings

    def _adapters(
        self,
        target: str | Workflow | Recipe,
        workflow: Workflow,
        overrides: Mapping[str, AdapterChoice] | None,
        shared: dict[str, Any],
    ) -> tuple[dict[str, Any], list[Any]]:
        """Return the adapters that a workflow reads, by port, and those among them that belong to this run alone."""
        found = self.registry.target(target) if isinstance(target, str) else target
        wanted = dict(found.adapters) if isinstance(found, Recipe) else {}
        overrides = {**wanted, **(overrides or {})}
        for port in (*overrides, *self._choices):
            if port not in PORTS:
                raise AdapterError(f"there is no port {port!r}", hint=f"ports: {', '.join(PORTS)}")
        chosen: dict[str, Any] = {}
        own: list[Any] = []
        for port in ports_of(workflow):
            if port in overrides:
                chosen[port] = self._build(port, overrides[port])
                if isinstance(overrides[port], (str, tuple)):
                    own.append(chosen[port])
            elif port in self._choices:
                if port not in shared:
                    adapter = self._build(port, self._choices[port])
                    if isinstance(self._choices[port], (str, tuple)):
                        shared[port] = adapter
                chosen[port] = shared.get(port, None if self._choices[port] is None else self._choices[port])
        return chosen, own

    def _build(self, port: str, choice: AdapterChoice) -> Any:
        if isinstance(choice, str):
            return self.registry.build_adapter(port, choice, {}, self._home)
        if isinstance(choice, tuple):
            name, options = choice
            return self.registry.build_adapter(port, name, options, self._home)
        return choice

    async def _begin(
        self, recipe: str, workflow: Workflow, config: RunConfig, adapters: Mapping[str, Any]
    ) -> tuple[RunContext, EventLog]:
        """Write a run's first records and return what its stages share."""
        run_id = new_run_id()
        manifest = build_manifest(workflow, recipe, config, adapters)
        directory = self._home / "runs" / run_id
        await run_sync(_make_directory, directory)
        record = RunRecord(
            run_id=run_id,
            workflow=recipe,
            config=manifest["config"],
            config_hash=manifest["config_hash"],
            created_at=time.time(),
        )
        await self.store.create_run(record)
        await self.store.put_manifest(run_id, manifest)
        log = EventLog(run_id, self.store)
        return RunContext(run_id, recipe, config.seed, directory, log, manifest), log


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
    target: str | Workflow | Recipe,
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
