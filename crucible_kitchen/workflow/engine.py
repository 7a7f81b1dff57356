"""The engine: runs a checked workflow as a tree of async tasks.

Sequential by default: one task walks the tree; every resource has a task of its own, every branch of a ``Parallel``
too, all below one task group, so that nothing outlives the run. Runs on asyncio and on trio alike. It knows no
adapter, no store and no sink. Read next: ``crucible_kitchen.workflow.resources``.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CleanupError, CrucibleError, StageTimeout
from crucible_kitchen.events import StageErrored, StageStart, StageStop
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.workflow.binding import binder_of
from crucible_kitchen.workflow.branches import Branches
from crucible_kitchen.workflow.clock import loop_clock, scope_class
from crucible_kitchen.workflow.conditions import nested_config
from crucible_kitchen.workflow.failures import as_ours, first_of, note, reacts_to_cancel
from crucible_kitchen.workflow.frame import Block, Frame, each, opens_resources
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, When, Workflow
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
    engine = _Engine(config, adapters, context)
    return await watched(partial(engine.run, workflow), config, context)


class _Engine:
    """One walk through one workflow."""

    def __init__(self, config: RunConfig, adapters: Mapping[str, Any], context: RunContext) -> None:
        self._config = config
        self._adapters = adapters
        self._context = context
        self._compensations: list[tuple[Callable[..., Any], dict[str, Any], str]] = []
        self._now = loop_clock()
        self._scope = scope_class()
        self._unwritten = 0
        self._waits = 0
        self._group: anyio.abc.TaskGroup

    async def run(self, workflow: Workflow) -> dict[str, Any]:
        """Run the workflow's body as the outermost block."""
        frame = Frame({}, self._config, workflow.name, {}, self._config.durability == "behind")
        failure: Exception | None = None
        async with anyio.create_task_group() as self._group:
            try:
                await self._block(workflow.body, frame)
            except Exception as error:  # noqa: BLE001 - raised below, outside the group that would wrap it
                failure = error
        if failure is None:
            return frame.values
        cancelled = anyio.current_effective_deadline() == -math.inf
        if self._config.on_failure == "rollback" and not cancelled:
            await self._compensate(failure)
        raise failure

    # -- blocks and nodes -----------------------------------------------------------------------------------------

    async def _block(self, nodes: Sequence[Node], frame: Frame) -> None:
        """Run nodes and close, newest first, the resources they opened, whatever happened."""
        if not opens_resources(nodes):
            await self._nodes(nodes, frame)
            return
        block, outer, behind = Block(), frame.block, frame.behind
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
        with anyio.CancelScope(shield=True):
            await self._close_all(block, frame)
        frame.block, frame.behind = outer, behind
        if cancelled is not None and block.muted:
            note(cancelled, block.failures)
            raise cancelled
        if block.failures:
            note(block.failures[0], block.failures[1:])
            raise block.failures[0]

    async def _nodes(self, nodes: Sequence[Node], frame: Frame) -> None:
        for node in nodes:
            if isinstance(node, Step):
                await self._step(node, frame)
            elif isinstance(node, When):
                holds = self._call(node.test, frame, frame.prefix)
                await self._nodes(node.body if holds else node.otherwise, frame)
            elif isinstance(node, Loop):
                await self._loop(node, frame)
            elif isinstance(node, Parallel):
                await Branches(node, frame, self._block).run()
            else:
                await self._nested(node, frame)

    async def _loop(self, node: Loop, frame: Frame) -> None:
        prefix, turns, index = frame.prefix, frame.turns, 0
        path = f"{prefix}/{node.name}"
        try:
            async with aclosing(each(self._call(node.over, frame, path), path)) as items:
                async for item in items:
                    waits, frame.prefix = self._waits, f"{path}[{index}]"
                    frame.turns = {**turns, node.name: index}
                    frame.values[node.name] = item
                    await self._block(node.body, frame)
                    if node.until is not None and self._call(node.until, frame, frame.prefix):
                        break
                    index += 1
                    if self._waits == waits:  # a loop of stages that never wait lets others run
                        await anyio.lowlevel.checkpoint()
        finally:
            frame.prefix, frame.turns = prefix, turns
            frame.values.pop(node.name, None)

    async def _nested(self, node: Workflow, frame: Frame) -> None:
        inner = frame.fork()
        inner.config = nested_config(node, frame.config)
        inner.prefix = f"{frame.prefix}/{node.name}"
        await self._block(node.body, inner)
        frame.values |= {name: inner.values[name] for name in node.returns}

    # -- stages ---------------------------------------------------------------------------------------------------

    async def _step(self, step: Step, frame: Frame) -> None:
        path, attempt = f"{frame.prefix}/{step.name}", 1
        began = self._now()
        while True:
            self._began(step.name, path, attempt)
            try:
                value = await self._attempt(step, frame, path, attempt)
                break
            except Exception as error:  # noqa: BLE001 - user code; retried, skipped or raised with its place
                failure = as_ours(error, path)
                again = step.retry is not None and step.retry.allows(first_of(error), attempt)
            self._errored(step.name, path, failure, "retry" if again else step.on_error, began, attempt)
            if again:
                await self._pause(step, path, attempt)
                attempt += 1
            elif step.on_error == "skip":
                await self._settle(frame)
                return
            else:
                raise failure
        if step.writes is not None:
            frame.values[step.writes] = value
        if step.hooks.rollback is not None:
            self._compensations.append((step.hooks.rollback, self._arguments(step.hooks.rollback, frame, path), path))
        self._ended(step.name, path, began)
        await self._settle(frame)

    async def _settle(self, frame: Frame) -> None:
        """Make a stage's records durable; a stage that swallowed a cancellation ends the run here nevertheless."""
        self._unwritten += 1
        if not frame.behind:
            self._waits += 1
            await self._context.recorder.sync()
        elif self._unwritten >= _DRAIN_EVERY:
            self._unwritten, self._waits = 0, self._waits + 1
            await self._context.recorder.drain()
        else:
            await anyio.lowlevel.checkpoint_if_cancelled()

    async def _pause(self, step: Step, path: str, attempt: int) -> None:
        assert step.retry is not None
        uniform = random.Random(seed_of(self._context.seed, path, f"retry{attempt}")).random()
        await anyio.sleep(step.retry.pause(attempt, uniform))

    async def _attempt(self, step: Step, frame: Frame, path: str, attempt: int) -> Any:
        timeout = frame.config.stage_timeout if isinstance(step.timeout, Unset) else step.timeout
        arguments = self._arguments(step.fn, frame, path, attempt)
        if isinstance(step, Resource):
            return await self._open(step, frame, path, arguments, timeout)
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

    # -- events ---------------------------------------------------------------------------------------------------

    def _began(self, stage: str, path: str, attempt: int = 1) -> None:
        self._context.emit(StageStart(stage=stage, recipe=self._context.recipe, path=path, attempt=attempt))

    def _ended(self, stage: str, path: str, began: float) -> None:
        taken = self._now() - began
        self._context.emit(StageStop(stage=stage, recipe=self._context.recipe, path=path, duration_s=taken))

    def _errored(
        self, stage: str, path: str, error: CrucibleError, action: str, began: float, attempt: int = 1
    ) -> None:
        """Report a failure; a log that fails now does not hide it, and stops the run at the next event."""
        event = StageErrored(
            stage=stage,
            recipe=self._context.recipe,
            path=path,
            attempt=attempt,
            code=error.code,
            message=error.message,
            action=action,
            duration_s=self._now() - began,
        )
        try:
            self._context.emit(event)
        except Exception as unheard:  # noqa: BLE001 - the failure that is being reported comes first
            note(error, [unheard])

    # -- resources ------------------------------------------------------------------------------------------------

    async def _open(
        self, step: Resource[..., Any], frame: Frame, path: str, arguments: dict[str, Any], timeout: float | None
    ) -> Any:
        block, opened = frame.block, self._now()
        assert block is not None

        def died(error: Exception) -> None:
            ours = as_ours(error, path)
            self._errored(step.name, path, ours, "halt", opened)
            frame.fail(block, ours)
            block.scope.cancel()

        live = LiveResource(step.fn(**arguments), died)
        try:
            value = await live.open(self._group, timeout, frame.config.grace)
        finally:  # also if it yielded in the moment in which the run was cancelled
            if live.alive:
                block.live.append((step, path, live))
        capabilities = getattr(value, "capabilities", None)
        if isinstance(capabilities, TrainingCapabilities) and capabilities.recovery == "rollback":
            frame.behind = True  # inside a rollback session's block the record is the checkpoint
        return value

    async def _close_all(self, block: Block, frame: Frame) -> None:
        """Close a block's resources newest first; what goes wrong joins the block's failures. Never raises."""
        for step, path, live in reversed(block.live):
            if step.writes is not None:
                frame.values.pop(step.writes, None)
            if live.alive:  # else it died, which was reported at once
                try:
                    await self._close(path, live, frame.config.grace)
                except Exception as error:  # noqa: BLE001 - the next one is closed whatever happened
                    frame.fail(block, as_ours(error, path))

    async def _close(self, path: str, live: LiveResource, grace: float) -> None:
        where, began = f"{path}/cleanup", self._now()
        try:
            self._began("cleanup", where)
        finally:  # a log that cannot be written must not keep a resource open
            try:
                await live.close(grace)
            except CleanupError as error:
                self._errored("cleanup", where, error.at(path), "halt", began)
                raise
        self._ended("cleanup", where, began)

    async def _compensate(self, failure: Exception) -> None:
        """Run the compensations of what had been done, newest first, shielded and bounded."""
        for hook, arguments, path in reversed(self._compensations):
            where, began = f"{path}/rollback", self._now()
            try:
                self._began("rollback", where)
                await self._bounded(hook, arguments)
                self._ended("rollback", where, began)
            except Exception as error:  # noqa: BLE001 - the failure of the run is the one reported
                ours = as_ours(error, where)
                note(failure, [ours])
                self._errored("rollback", where, ours, "skip", began)

    async def _bounded(self, hook: Callable[..., Any], arguments: dict[str, Any]) -> None:
        grace = self._config.grace
        with anyio.CancelScope(shield=True, deadline=self._now() + grace) as scope:
            await hook(**arguments)
        if scope.cancelled_caught:
            raise _late(grace, "see the config key grace")

    # -- injection ------------------------------------------------------------------------------------------------

    def _arguments(self, fn: Callable[..., Any], frame: Frame, path: str, attempt: int = 1) -> dict[str, Any]:
        def run() -> Run:
            return Run(self._context, path, frame.turns, attempt)

        return binder_of(fn).bind(frame.values, frame.config, self._adapters, run)

    def _call(self, selector: Callable[..., Any], frame: Frame, path: str) -> Any:
        """Evaluate a selector: a plain pure function."""
        try:
            return selector(**self._arguments(selector, frame, path))
        except Exception as error:  # noqa: BLE001 - user code; raised again with its place
            failure = as_ours(error, path)
        raise failure


def _late(seconds: float, hint: str | None = None) -> StageTimeout:
    usual = "raise it: stage.with_(timeout=...), or the config key stage_timeout"
    return StageTimeout(f"did not end within {seconds:g} s", hint=hint or usual)
