"""A run from the outside: its handle, its result, and the one way in which an attempt ends.

Whatever happens, an attempt ends once: the status that ``wait`` gives, the last event of the log and the run's row in
the store agree, and are durable before ``wait`` returns. Read next: ``crucible_kitchen.kitchen``.
"""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CrucibleError, RunCancelled, RunPaused, StageFailed
from crucible_kitchen.events import EventRecord, WorkflowStart, WorkflowStop
from crucible_kitchen.redaction import redacted
from crucible_kitchen.store import TTL, FinalStatus, Lease, RunStore
from crucible_kitchen.telemetry import EventLog
from crucible_kitchen.types import BlobRef, JsonObject
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.failures import says, trace
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.run import RunContext, StateView
from crucible_kitchen.workflow.values import to_json

__all__ = ["RunHandle", "RunResult", "error_json", "json_part"]


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        run_id: the run.
        status: ``completed``, or ``validated`` after a dry run.
        state: what the stages wrote, read-only, by attribute or by item.
        metrics: the last value of each measurement, ``{"training.step.loss": 0.1, ...}``.
        artifacts: what the run produced: weights, checkpoints, reports.
        manifest: what was run, on what.
        duration_s: seconds it took.
    """

    run_id: str
    status: str
    state: StateView
    metrics: Mapping[str, float]
    artifacts: tuple[BlobRef, ...]
    manifest: Mapping[str, Any]
    duration_s: float

    def to_json(self) -> JsonObject:
        """Return the result as the command line prints it: the state without what JSON cannot hold."""
        return {
            "run_id": self.run_id,
            "status": self.status,
            "state": json_part(self.state),
            "metrics": dict(self.metrics),
            "artifacts": [artifact_json(a) for a in self.artifacts],
            "duration_s": self.duration_s,
        }


class RunHandle:
    """A started run: watch it, cancel it, wait for it. Made by ``Kitchen.start``."""

    def __init__(
        self,
        workflow: Workflow,
        config: RunConfig,
        adapters: Mapping[str, Any],
        context: RunContext,
        log: EventLog,
        lease: Lease,
    ) -> None:
        self._workflow = workflow
        self._config = config
        self._adapters = adapters
        self._context = context
        self._log = log
        self._lease = lease
        self._scope = anyio.CancelScope()
        self._done = anyio.Event()
        self._result: RunResult | None = None
        self._error: BaseException | None = None
        self.status = "running"

    @property
    def id(self) -> str:
        """The run's id."""
        return self._context.id

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What is run, on what."""
        return self._context.manifest

    def events(self, after: int | None = None) -> AsyncIterator[EventRecord]:
        """Iterate over the run's events after a place in its log, in order, without gaps, until the terminal one.

        Without a place it begins with this attempt's first; 0 begins with the run's first.
        """
        return self._log.events(after)

    async def cancel(self) -> None:
        """Cancel the run and return when nothing of it is left. Idempotent; a run that has ended stays as it is."""
        self._scope.cancel()
        await self._done.wait()

    async def drain(self, grace: float | None = None) -> None:
        """Stop the run at a checkpoint, to be resumed later: it ends ``paused``, or completed if it was about to.

        Args:
            grace: seconds until it is cancelled instead, which loses what came after its last checkpoint; unset: the
                config's.
        """
        self._context.draining = True
        with anyio.move_on_after(self._config.grace if grace is None else grace):
            await self._done.wait()
            return
        await self.cancel()

    async def wait(self) -> RunResult:
        """Return the result once the run has ended.

        Raises:
            CrucibleError: the failure that ended it, with the stage's path.
            RunCancelled: it was cancelled.
            RunPaused: it was drained.
        """
        await self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    async def attempt(self, store: RunStore, closing: AsyncExitStack) -> None:
        """Run the workflow once, from the first event to the last; what ``closing`` holds is released before the end.

        Only the kitchen calls it, in a task of its own; it raises nothing but cancellation from outside.
        """
        began = time.monotonic()
        context = self._context
        state: dict[str, Any] = {}
        failure: BaseException | None = None
        try:
            config = self._config.model_dump(mode="json")
            context.emit(WorkflowStart(recipe=context.recipe, config=config, attempt=self._lease.epoch))
            with self._scope:
                state = await self._owned(store)
        except Exception as error:  # noqa: BLE001 - the run's failure, reported by wait()
            failure = error
        except BaseException as error:
            failure = error
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(store, closing, state, failure, time.monotonic() - began)

    async def _owned(self, store: RunStore) -> dict[str, Any]:
        """Run the workflow while the lease is renewed; a run that was taken over ends at once."""
        state: dict[str, Any] = {}
        failure: Exception | None = None

        async def renew() -> None:
            nonlocal failure
            try:
                while True:
                    await anyio.sleep(TTL / 3)
                    self._lease = await store.renew(self._lease)
            except CrucibleError as error:
                failure = error
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(renew)
            try:
                state = await execute(self._workflow, self._config, self._adapters, self._context)
            except Exception as error:  # noqa: BLE001 - raised below, outside the group that would wrap it
                failure = failure or error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return state

    async def _end(
        self,
        store: RunStore,
        closing: AsyncExitStack,
        state: dict[str, Any],
        failure: BaseException | None,
        took: float,
    ) -> None:
        context = self._context
        try:
            await closing.aclose()
        except Exception as broken:  # noqa: BLE001 - an adapter that cannot be closed fails the run, not the kitchen
            failure = failure or broken
        status: FinalStatus = "completed"
        if self._scope.cancelled_caught or (failure is not None and not isinstance(failure, Exception)):
            status, failure = "cancelled", RunCancelled(f"the run {context.id} was cancelled")
        elif failure is not None:
            status = "paused" if isinstance(failure, RunPaused) else "failed"
        try:
            await self._record_end(store, state, status, failure, took)
        except CrucibleError as broken:  # the log or the disk: the run cannot be called completed
            status, failure = "failed", failure or broken
        self.status, self._error = status, failure
        view, metrics = StateView(state), dict(context.metrics)
        self._result = RunResult(context.id, status, view, metrics, tuple(context.artifacts), context.manifest, took)
        self._done.set()

    async def _record_end(
        self, store: RunStore, state: dict[str, Any], status: FinalStatus, failure: BaseException | None, took: float
    ) -> None:
        """Write the last event and the run's row, durably."""
        context = self._context
        error = error_json(failure) if failure is not None and status == "failed" else None
        where = trace(failure) if failure is not None and status == "failed" else []
        context.emit(WorkflowStop(recipe=context.recipe, status=status, duration_s=took, error=error, traceback=where))
        await self._log.sync()
        for artifact in context.artifacts:
            await store.put_artifact(context.id, artifact)
        outcome = {"state": json_part(StateView(state)), "metrics": dict(context.metrics), "duration_s": took}
        await store.finish_run(context.id, status, outcome, error)


def error_json(error: BaseException) -> JsonObject:
    """Return an error as the store and the events keep it."""
    if isinstance(error, CrucibleError):
        message, hint = redacted(error.message), redacted(error.hint) if error.hint else None
        return {"code": error.code, "message": message, "where": error.where, "hint": hint}
    return {"code": StageFailed.code, "message": says(error), "where": None, "hint": None}


def artifact_json(artifact: BlobRef) -> JsonObject:
    """Return an artifact as the command line prints it."""
    return asdict(artifact)


def json_part(state: StateView) -> JsonObject:
    """Return the part of a state that JSON can hold; frozen dataclasses and pydantic models become objects."""
    found: JsonObject = {}
    for name in state:
        try:
            found[name] = to_json(state[name])
        except TypeError:
            continue
    return found
