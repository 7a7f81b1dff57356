"""The engine: runs a checked workflow as a tree of async tasks.

Sequential by default: one task walks the tree; every resource has a task of its own, every branch of a ``Parallel``
too, all below one task group, so that nothing outlives the run. Runs on asyncio and on trio alike. It knows no
adapter, no store and no sink. Read next: ``crucible_kitchen.workflow.resources``.
"""

import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CleanupError, RunPaused, StageTimeout
from crucible_kitchen.events import WarningRaised
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.types import Json
from crucible_kitchen.workflow.binding import binder_of
from crucible_kitchen.workflow.branches import Branches
from crucible_kitchen.workflow.checkpoints import Checkpoints
from crucible_kitchen.workflow.clock import loop_clock, scope_class
from crucible_kitchen.workflow.compensations import Compensations
from crucible_kitchen.workflow.conditions import nested_config
from crucible_kitchen.workflow.failures import as_ours, first_of, note, reacts_to_cancel
from crucible_kitchen.workflow.forward import static
from crucible_kitchen.workflow.frame import (
    Block,
    Frame,
    Live,
    OpenLoop,
    OpenSession,
    Origin,
    each,
    opens_resources,
)
from crucible_kitchen.workflow.memory import Keep
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, Stream, When, Workflow
from crucible_kitchen.workflow.records import Records
from crucible_kitchen.workflow.reports import Reports
from crucible_kitchen.workflow.resources import LiveResource
from crucible_kitchen.workflow.run import Run, RunContext, seed_of
from crucible_kitchen.workflow.stage import Resource, Step, Unset
from crucible_kitchen.workflow.watchdog import watched

__all__ = ["execute"]

_DRAIN_EVERY = 64
"""Stages that do not wait for their records wait for the log to catch up after so many."""


async def execute(
    workflow: Workflow, config: RunConfig, adapters: Mapping[str, Any], context: RunContext
) -> dict[str, Any]:
    """Run a checked workflow and return its state.

    Args:
        workflow: the tree; :func:`crucible_kitchen.workflow.check.check` has passed it.
        config: of the workflow's config class.
        adapters: adapter by port name.
        context: the run's identity, seed and log.

    Raises:
        CrucibleError: the first failure in time, with the stage's path; what failed after it is in its notes. A run
            that was cancelled raises the cancellation, unless it had failed before, or a stage failed in reaction.
    """
    engine = _Engine(workflow, config, adapters, context)
    return await watched(engine.run, config, context)


class _Engine:
    """One walk through one workflow."""

    def __init__(self, workflow: Workflow, config: RunConfig, adapters: Mapping[str, Any], context: RunContext) -> None:
        self._workflow = workflow
        self._config = config
        self._adapters = adapters
        self._context = context
        self._records = Records(workflow, context)
        self._reports = Reports(context)
        self._compensations = Compensations(self._reports, config.grace)
        self._now = loop_clock()
        self._scope = scope_class()
        self._unwritten = 0
        self._waits = 0
        self._group: anyio.abc.TaskGroup
        self._checkpoints: Checkpoints | None = None

    async def run(self) -> dict[str, Any]:
        """Run the workflow's body as the outermost block."""
        name = self._workflow.name
        frame = Frame({}, self._config, name, {}, self._config.durability == "behind", name)
        failure: Exception | None = None
        async with anyio.create_task_group() as self._group:
            if self._context.memory is not None:
                self._checkpoints = Checkpoints(self._context, self._context.memory, self._group, _end_block)
            try:
                await self._block(self._workflow.body, frame, name)
            except Exception as error:  # noqa: BLE001 - raised below, outside the group that would wrap it
                failure = error
        if failure is None:
            return frame.values
        cancelled = anyio.current_effective_deadline() == -math.inf
        if self._config.on_failure == "rollback" and not cancelled and not isinstance(failure, RunPaused):
            await self._compensations.run(failure)
        raise failure

    # -- blocks and nodes -----------------------------------------------------------------------------------------

    async def _block(self, nodes: Sequence[Node], frame: Frame, path: str) -> None:
        """Run nodes and close, newest first, the resources they opened, whatever happened."""
        if not opens_resources(nodes):
            await self._nodes(nodes, frame)
            return
        if self._records.replay_block(frame, path):
            return
        block, outer, before = Block(frame.block), replace(frame), dict(frame.values)
        frame.block = block
        cancelled: BaseException | None = None
        try:
            with block.scope:  # cancelled when one of its resources dies
                await self._nodes(nodes, frame)
        except Exception as error:  # noqa: BLE001 - raised below, after clean-up
            frame.fail(block, error)
        except BaseException as error:  # noqa: BLE001 - raised below, after clean-up
            cancelled = error
        block.muted = cancelled is not None and not block.failures
        own = frame.sessions[len(outer.sessions) :]
        with anyio.CancelScope(shield=True):
            await self._close_all(block, frame)
        frame.block, frame.behind, frame.sessions = outer.block, outer.behind, outer.sessions
        if cancelled is not None and block.muted:
            note(cancelled, block.failures)
            raise cancelled
        if block.failures:
            note(block.failures[0], block.failures[1:])
            raise block.failures[0]
        if own and not frame.sessions:
            self._records.keep_block(frame, path, before)

    async def _nodes(self, nodes: Sequence[Node], frame: Frame) -> None:
        for node in nodes:
            forward = frame.seeking()
            if forward is not None and not forward.wants(node, frame.prefix):
                continue
            if isinstance(node, Step):
                await self._step(node, frame)
            elif isinstance(node, When):
                await self._nodes(self._side(node, frame), frame)
            elif isinstance(node, (Loop, Stream)):
                await self._loop(node, frame)
            elif isinstance(node, Parallel):
                await Branches(node, frame, self._block).run()
            else:
                await self._nested(node, frame)

    def _side(self, node: When, frame: Frame) -> Sequence[Node]:
        """Return the side of a ``When`` to run: what its test says, or on the way to a checkpoint what was taken."""
        forward = frame.seeking()
        taken = forward.side(node, frame.prefix) if forward is not None else None
        if taken is not None:
            return taken
        return node.body if self._call(node.test, frame, frame.prefix) else node.otherwise

    async def _loop(self, node: Loop | Stream, frame: Frame) -> None:
        path, forward = f"{frame.prefix}/{node.name}", frame.seeking()
        first, position = forward.turn(path) if forward is not None else (0, None)
        here = OpenLoop(path, frame.read_by(node.over), first)
        over = self._call(node.over, frame, path, forward.reads(path) if forward is not None else None)
        if isinstance(node, Loop):
            await self._turns(node, here, each(over, path, first, position), frame)
            return
        here.feed = over
        try:
            async with over.running(self._producer(node, frame, path), warn=partial(self._warn, path)):
                await self._turns(node, here, each(over, path, first, position), frame)
        except Exception as error:  # noqa: BLE001 - a feed's own task group may have wrapped what a stage raised
            failure = as_ours(error, path)
        else:
            return
        raise failure

    async def _turns(
        self, node: Loop | Stream, here: OpenLoop, over: AsyncGenerator[tuple[Json, Any], None], frame: Frame
    ) -> None:
        prefix, turns, path = frame.prefix, frame.turns, here.path
        frame.loops.append(here)
        try:
            async with aclosing(over) as items:
                async for here.position, item in items:
                    waits, frame.prefix = self._waits, f"{path}[{here.index}]"
                    frame.turns = {**turns, node.name: here.index}
                    frame.write(node.name, item, Origin(frame.prefix))
                    await self._block(node.body, frame, frame.prefix)
                    if (
                        isinstance(node, Loop)
                        and node.until is not None
                        and self._call(node.until, frame, frame.prefix)
                    ):
                        break
                    here.index += 1
                    if self._waits == waits:  # a loop of stages that never wait lets others run
                        await anyio.lowlevel.checkpoint()
        finally:
            frame.prefix, frame.turns = prefix, turns
            frame.loops.remove(here)
            frame.drop(node.name)

    def _producer(self, node: Stream, frame: Frame, path: str) -> Callable[[Any], Awaitable[Any]]:
        """Return what produces one draw of a stream: it sees the state as it is now, and the draw."""
        seen, fn = frame.fork(), node.produce.fn
        run = Run(self._context, f"{path}/{node.produce.name}", frame.turns, 1)

        async def produce(draw: Any) -> Any:
            values = {**seen.values, node.draws: draw}
            return await fn(**binder_of(fn).bind(values, seen.config, self._adapters, lambda: run))

        return produce

    def _warn(self, path: str, code: str, message: str) -> None:
        self._context.emit(WarningRaised(code=code, message=message, path=path))

    async def _nested(self, node: Workflow, frame: Frame) -> None:
        inner = frame.fork()
        inner.config = nested_config(node, frame.config)
        inner.prefix = inner.base = f"{frame.prefix}/{node.name}"
        forward = frame.seeking()
        if forward is not None:
            forward.restore(inner)
        await self._block(node.body, inner, inner.prefix)
        for name in node.returns:
            frame.write(name, inner.values[name], inner.origins[name])

    # -- stages ---------------------------------------------------------------------------------------------------

    async def _step(self, step: Step, frame: Frame) -> None:
        """Run a stage or open a resource, unless an earlier attempt did so and it is recorded."""
        path, forward = f"{frame.prefix}/{step.name}", frame.seeking()
        resource = isinstance(step, Resource)
        if forward is None or resource:
            recorded = self._records.kept(frame) and not resource
            if not (recorded and self._records.replay(step, frame, path)):
                await self._tries(step, frame, path, recorded=recorded)
                await self._settle(frame, path, pause=not resource)
        if forward is not None:
            forward.passed(path)

    async def _tries(self, step: Step, frame: Frame, path: str, *, recorded: bool) -> None:
        """Try a stage as often as its policy says; afterwards its value is in the state."""
        began, attempt = self._now(), 1
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
                    self._records.keep_skipped(step, frame, path)
                return
            else:
                raise failure
        if recorded:
            self._records.keep(step, frame, path, value, run.made)
        elif step.writes is not None and not isinstance(step, Resource):
            frame.write(step.writes, value, Origin("", static(path)))
        if step.hooks.rollback is not None:
            arguments = self._arguments(step.hooks.rollback, frame, run)
            self._compensations.add(step.hooks.rollback, arguments, path)
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
            self._waits += 1
            await self._context.recorder.sync()
        elif self._unwritten >= _DRAIN_EVERY:
            self._unwritten, self._waits = 0, self._waits + 1
            await self._context.recorder.drain()
        else:
            await anyio.lowlevel.checkpoint_if_cancelled()
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
        arguments = self._arguments(step.fn, frame, run)
        if timeout is None:
            return await step.fn(**arguments)
        with self._scope(deadline=self._now() + timeout) as scope:
            try:
                return await step.fn(**arguments)
            except Exception as error:
                if scope.cancel_called and reacts_to_cancel(error):
                    raise _late(timeout) from error
                raise
        raise _late(timeout)

    # -- resources ------------------------------------------------------------------------------------------------

    async def _open(self, step: Resource[..., Any], frame: Frame, run: Run, timeout: float | None) -> Any:
        block, opened, path = frame.block, self._now(), run.path
        assert block is not None
        forward = frame.seeking()
        arguments = self._arguments(step.fn, frame, run, forward.reads(path) if forward is not None else None)

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
            stands_for = self._records.input_hash(step.fn, frame, path) if self._records.kept(frame) else path
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
            frame.forward = await self._checkpoints.restore(opened, self._records.types)

    async def _close_all(self, block: Block, frame: Frame) -> None:
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
        where, began = f"{path}/cleanup", self._now()
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

    def _arguments(
        self, fn: Callable[..., Any], frame: Frame, run: Run, instead: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what a function is given here; ``instead`` are values as they were when it was entered."""
        values = {**frame.values, **instead} if instead else frame.values
        return binder_of(fn).bind(values, frame.config, self._adapters, lambda: run)

    def _call(
        self, selector: Callable[..., Any], frame: Frame, path: str, instead: Mapping[str, Any] | None = None
    ) -> Any:
        """Evaluate a selector: a plain pure function."""
        try:
            return selector(**self._arguments(selector, frame, Run(self._context, path, frame.turns), instead))
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
