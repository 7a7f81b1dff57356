"""One stage or one resource: tried, timed, retried, recorded, opened and closed, each told to the log.

It knows where it stands by its frame, and nothing of the tree around it. Read next:
``crucible_kitchen.workflow.resources`` and ``.records``.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CleanupError, RunPaused, StageTimeout
from crucible_kitchen.loop import EventLoop
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.workflow.binding import binder_of
from crucible_kitchen.workflow.checkpoints import Checkpoints
from crucible_kitchen.workflow.compensations import Compensations
from crucible_kitchen.workflow.failures import as_ours, first_of, reacts_to_cancel
from crucible_kitchen.workflow.forward import static
from crucible_kitchen.workflow.frame import Block, Frame, Live, OpenSession, Origin
from crucible_kitchen.workflow.memory import Keep
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.records import Records
from crucible_kitchen.workflow.reports import Reports
from crucible_kitchen.workflow.resources import LiveResource
from crucible_kitchen.workflow.run import Run, RunContext, seed_of
from crucible_kitchen.workflow.stage import Resource, Step, Unset

__all__ = ["Steps"]

_DRAIN_EVERY = 64
"""Stages that do not wait for their records wait for the log to catch up after so many."""


class Steps:
    """The stages and resources of one run.

    Args:
        workflow: the tree they stand in.
        config: the run's.
        adapters: adapter by port name.
        context: the run's identity, seed, log and memory.
        group: where resources have their tasks, and checkpoints are written.

    Attributes:
        waits: how often a stage waited for the log; others ran meanwhile.
        records: what is done, and what earlier attempts did.
        compensations: what undoes the stages that were done.
    """

    def __init__(
        self,
        workflow: Workflow,
        config: RunConfig,
        adapters: Mapping[str, Any],
        context: RunContext,
        group: anyio.abc.TaskGroup,
    ) -> None:
        self.waits = 0
        self.records = Records(workflow, context)
        self._adapters = adapters
        self._context = context
        self._group = group
        self._loop = EventLoop()
        self._reports = Reports(context, self._loop)
        self.compensations = Compensations(self._reports, self._loop, config.grace)
        self._unwritten = 0
        memory = context.memory
        self._checkpoints = None if memory is None else Checkpoints(context, memory, group, _end_block)

    # -- stages ---------------------------------------------------------------------------------------------------

    async def run(self, step: Step, frame: Frame) -> None:
        """Run a stage or open a resource, unless an earlier attempt did so and it is recorded."""
        path, forward = f"{frame.prefix}/{step.name}", frame.seeking()
        resource = isinstance(step, Resource)
        if forward is None or resource:
            recorded = self.records.kept(frame) and not resource
            if not (recorded and self.records.replay(step, frame, path)):
                await self._tries(step, frame, path, recorded=recorded)
                await self._settle(frame, path, pause=not resource)
        if forward is not None:
            forward.passed(path)

    async def _tries(self, step: Step, frame: Frame, path: str, *, recorded: bool) -> None:
        """Try a stage as often as its policy says; afterwards its value is in the state."""
        began, attempt = self._loop.time(), 1
        while True:
            self._reports.began(step.name, path, attempt)
            run = Run(self._context, path, frame.turns, attempt)
            try:
                value = await self._attempt(step, frame, run)
                break
            except Exception as error:  # noqa: BLE001 - user code; retried, skipped or raised with its place
                failure = as_ours(error, path)
                again = step.retry is not None and step.retry.allows(first_of(error), attempt)
            self._reports.errored(step.name, path, failure, "retry" if again else step.on_error, began, attempt)
            if again:
                await self._wait_to_retry(step, path, attempt)
                attempt += 1
            elif step.on_error == "skip":
                if recorded:
                    self.records.keep_skipped(step, frame, path)
                return
            else:
                raise failure
        if recorded:
            self.records.keep(step, frame, path, value, run.made)
        elif step.writes is not None and not isinstance(step, Resource):
            frame.write(step.writes, value, Origin("", static(path)))
        if step.hooks.rollback is not None:
            arguments = self.arguments(step.hooks.rollback, frame, run)
            self.compensations.add(step.hooks.rollback, arguments, path)
        self._reports.ended(step.name, path, began)
        if run.made.checkpoint is not None:
            await self._checkpoint(frame, path, run.made.checkpoint)

    async def _settle(self, frame: Frame, path: str, *, pause: bool) -> None:
        """Make a stage's records durable; a stage that swallowed a cancellation ends the run here nevertheless.

        Raises:
            RunPaused: the run is to stop, and everything up to here can be found again.
        """
        self._unwritten += 1
        if not frame.behind:
            self.waits += 1
            await self._context.recorder.sync()
        elif self._unwritten >= _DRAIN_EVERY:
            self._unwritten, self.waits = 0, self.waits + 1
            await self._context.recorder.drain()
        else:
            await self._loop.checkpoint_if_cancelled()
        if pause and self._context.draining and not frame.fenced and self._checkpoints is not None:
            await self._checkpoint(frame, path, Keep())
            raise RunPaused(f"the run {self._context.id} stopped after {path}", hint="resume it when you like")

    async def _checkpoint(self, frame: Frame, path: str, keep: Keep) -> None:
        if self._checkpoints is not None and frame.sessions:
            await self._checkpoints.take(frame, path, keep)

    async def _wait_to_retry(self, step: Step, path: str, attempt: int) -> None:
        assert step.retry is not None
        uniform = random.Random(seed_of(self._context.seed, path, f"retry{attempt}")).random()
        await anyio.sleep(step.retry.pause(attempt, uniform))

    async def _attempt(self, step: Step, frame: Frame, run: Run) -> Any:
        timeout = frame.config.stage_timeout if isinstance(step.timeout, Unset) else step.timeout
        if isinstance(step, Resource):
            return await self._open(step, frame, run, timeout)
        arguments = self.arguments(step.fn, frame, run)
        if timeout is None:
            return await step.fn(**arguments)
        with self._loop.scope(deadline=self._loop.time() + timeout) as scope:
            try:
                return await step.fn(**arguments)
            except Exception as error:
                if scope.cancel_called and reacts_to_cancel(error):
                    raise _late(timeout) from error
                raise
        raise _late(timeout)

    # -- resources ------------------------------------------------------------------------------------------------

    async def _open(self, step: Resource[..., Any], frame: Frame, run: Run, timeout: float | None) -> Any:
        block, opened, path = frame.block, self._loop.time(), run.path
        assert block is not None
        forward = frame.seeking()
        arguments = self.arguments(step.fn, frame, run, forward.reads(path) if forward is not None else None)

        def died(error: Exception) -> None:
            ours = as_ours(error, path)
            self._reports.errored(step.name, path, ours, "halt", opened)
            _end_block(frame, block, ours)

        live = LiveResource(step.fn(**arguments), died)
        try:
            value = await live.open(self._group, timeout, frame.config.grace)
        finally:  # also if it yielded in the moment in which the run was cancelled
            if live.alive:
                block.live.append(Live(step, path, live, frame.read_by(step.fn)))
        if step.writes is not None:
            stands_for = self.records.input_hash(step.fn, frame, path) if self.records.kept(frame) else path
            frame.write(step.writes, value, Origin(stands_for))
        capabilities = getattr(value, "capabilities", None)
        if isinstance(capabilities, TrainingCapabilities) and capabilities.recovery == "rollback":
            await self._opened_session(frame, path, value)
        return value

    async def _opened_session(self, frame: Frame, path: str, session: Any) -> None:
        """Go back to the newest checkpoint of a session; from here on the record is the checkpoint."""
        assert frame.block is not None
        opened = OpenSession(path, session, frame, frame.block, session.position)
        frame.sessions = (*frame.sessions, opened)
        frame.behind = True
        if self._checkpoints is None:
            return
        forward = frame.seeking()
        if forward is not None:
            await self._checkpoints.load(opened, forward)
        elif len(frame.sessions) == 1:
            frame.forward = await self._checkpoints.restore(opened, self.records.types)

    async def close_all(self, block: Block, frame: Frame) -> None:
        """Close a block's resources newest first; what goes wrong joins the block's failures. Never raises."""
        if self._checkpoints is not None and any(opened.block is block for opened in frame.sessions):
            with anyio.move_on_after(frame.config.grace):
                await self._checkpoints.settle(frame.sessions[0])
        for live in reversed(block.live):
            if live.step.writes is not None:
                frame.drop(live.step.writes)
            if live.resource.alive:  # else it died, which was reported at once
                try:
                    await self._close(live.path, live.resource, frame.config.grace)
                except Exception as error:  # noqa: BLE001 - the next one is closed whatever happened
                    frame.fail(block, as_ours(error, live.path))

    async def _close(self, path: str, live: LiveResource, grace: float) -> None:
        where, began = f"{path}/cleanup", self._loop.time()
        try:
            self._reports.began("cleanup", where)
        finally:  # a log that cannot be written must not keep a resource open
            try:
                await live.close(grace)
            except CleanupError as error:
                self._reports.errored("cleanup", where, error.at(path), "halt", began)
                raise
        self._reports.ended("cleanup", where, began)

    # -- injection ------------------------------------------------------------------------------------------------

    def arguments(
        self, fn: Callable[..., Any], frame: Frame, run: Run, instead: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what a function is given here; ``instead`` are values as they were when it was entered."""
        values = {**frame.values, **instead} if instead else frame.values
        return binder_of(fn).bind(values, frame.config, self._adapters, run)

    def call(
        self, selector: Callable[..., Any], frame: Frame, path: str, instead: Mapping[str, Any] | None = None
    ) -> Any:
        """Evaluate a selector: a plain pure function."""
        try:
            return selector(**self.arguments(selector, frame, Run(self._context, path, frame.turns), instead))
        except Exception as error:  # noqa: BLE001 - user code; raised again with its place
            failure = as_ours(error, path)
        raise failure


def _end_block(frame: Frame, block: Block, error: Exception) -> None:
    """Fail a block from outside its own walk."""
    frame.fail(block, error)
    block.scope.cancel()


def _late(seconds: float) -> StageTimeout:
    usual = "raise it: stage.with_(timeout=...), or the config key stage_timeout"
    return StageTimeout(f"did not end within {seconds:g} s", hint=usual)
