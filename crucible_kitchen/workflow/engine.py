"""The engine: the walk through a checked workflow, as a tree of async tasks.

Sequential by default: one task walks the tree; every resource has a task of its own, every branch of a ``Parallel``
too, all below one task group, so that nothing outlives the run. Runs on asyncio and on trio alike. It knows no
adapter, no store and no sink, and of a stage only that it is run. Read next: ``crucible_kitchen.workflow.steps``.
"""

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import RunPaused
from crucible_kitchen.events import WarningRaised
from crucible_kitchen.types import Json
from crucible_kitchen.workflow.branches import Branches
from crucible_kitchen.workflow.conditions import nested_config
from crucible_kitchen.workflow.failures import as_ours, note
from crucible_kitchen.workflow.frame import Block, Frame, OpenLoop, Origin, each, opens_resources
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, Stream, When, Workflow
from crucible_kitchen.workflow.run import Run, RunContext
from crucible_kitchen.workflow.stage import Step
from crucible_kitchen.workflow.steps import Steps
from crucible_kitchen.workflow.watchdog import watched

__all__ = ["execute"]


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
        self._steps: Steps

    async def run(self) -> dict[str, Any]:
        """Run the workflow's body as the outermost block."""
        name = self._workflow.name
        frame = Frame({}, self._config, name, {}, self._config.durability == "behind", name)
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            self._steps = Steps(self._workflow, self._config, self._adapters, self._context, group)
            try:
                await self._block(self._workflow.body, frame, name)
            except Exception as error:  # noqa: BLE001 - raised below, outside the group that would wrap it
                failure = error
        if failure is None:
            return frame.values
        cancelled = anyio.current_effective_deadline() == -math.inf
        if self._config.on_failure == "rollback" and not cancelled and not isinstance(failure, RunPaused):
            await self._steps.compensations.run(failure)
        raise failure

    # -- blocks and nodes -----------------------------------------------------------------------------------------

    async def _block(self, nodes: Sequence[Node], frame: Frame, path: str) -> None:
        """Run nodes and close, newest first, the resources they opened, whatever happened."""
        if not opens_resources(nodes):
            await self._nodes(nodes, frame)
            return
        if self._steps.records.replay_block(frame, path):
            return
        block, outer, before = Block(frame.block), replace(frame), dict(frame.origins)
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
            await self._steps.close_all(block, frame)
        frame.block, frame.behind, frame.sessions = outer.block, outer.behind, outer.sessions
        if cancelled is not None and block.muted:
            note(cancelled, block.failures)
            raise cancelled
        if block.failures:
            note(block.failures[0], block.failures[1:])
            raise block.failures[0]
        if own and not frame.sessions:
            self._steps.records.keep_block(frame, path, before)

    async def _nodes(self, nodes: Sequence[Node], frame: Frame) -> None:
        for node in nodes:
            forward = frame.seeking()
            if forward is not None and not forward.wants(node, frame.prefix):
                continue
            if isinstance(node, Step):
                await self._steps.run(node, frame)
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
        return node.body if self._steps.call(node.test, frame, frame.prefix) else node.otherwise

    async def _loop(self, node: Loop | Stream, frame: Frame) -> None:
        path, forward = f"{frame.prefix}/{node.name}", frame.seeking()
        first, position = forward.turn(path) if forward is not None else (0, None)
        here = OpenLoop(path, frame.read_by(node.over), first)
        over = self._steps.call(node.over, frame, path, forward.reads(path) if forward is not None else None)
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
                    waits, frame.prefix = self._steps.waits, f"{path}[{here.index}]"
                    frame.turns = {**turns, node.name: here.index}
                    frame.write(node.name, item, Origin(frame.prefix))
                    await self._block(node.body, frame, frame.prefix)
                    if (
                        isinstance(node, Loop)
                        and node.until is not None
                        and self._steps.call(node.until, frame, frame.prefix)
                    ):
                        break
                    here.index += 1
                    if self._steps.waits == waits:  # a loop of stages that never wait lets others run
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
            return await fn(**self._steps.arguments(fn, seen, run, {node.draws: draw}))

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
