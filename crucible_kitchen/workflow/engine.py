"""The engine: runs a checked workflow as a tree of async tasks.

Sequential by default: one task walks the tree; every resource has a task of its own, every branch of a ``Parallel``
too, all below one task group, so that nothing outlives the run. Runs on asyncio and on trio alike. It knows no
adapter, no store and no sink. Read next: ``crucible_kitchen.workflow.resources``.
"""

import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CrucibleError, StageFailed, StageTimeout
from crucible_kitchen.events import StageErrored, StageStart, StageStop
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.workflow.check import PORT_NAMES, nested_config
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, Positioned, When, Workflow
from crucible_kitchen.workflow.resources import LiveResource
from crucible_kitchen.workflow.run import Run, RunContext, seed_of
from crucible_kitchen.workflow.stage import Resource, Step, Unset, signature_of

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
        CrucibleError: the first failure, with the stage's path; what failed after it is in its notes.
    """
    return await _Engine(config, adapters, context).run(workflow)


@dataclass(slots=True)
class _Block:
    """The lifetime of resources: the workflow, a loop's turn, or a branch."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    live: list[tuple[Resource[..., Any], str, LiveResource]] = field(default_factory=list)


@dataclass(slots=True)
class _Frame:
    """Where the walk is: the state it sees, its config, its path and turns."""

    values: dict[str, Any]
    config: RunConfig
    prefix: str
    turns: dict[str, int]
    behind: bool
    block: _Block | None = None

    def fork(self) -> "_Frame":
        return _Frame(dict(self.values), self.config, self.prefix, self.turns, self.behind, self.block)


@dataclass(frozen=True, slots=True)
class _Binder:
    """Where a function's arguments come from, found out once."""

    run: bool
    config: bool
    ports: tuple[tuple[str, Any], ...]
    required: tuple[str, ...]
    optional: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> "_Binder":
        ps = signature_of(fn).parameters
        state = [p for p in ps if p.name not in PORT_NAMES and p.name not in ("run", "config")]
        return cls(
            run=any(p.name == "run" for p in ps),
            config=any(p.name == "config" for p in ps),
            ports=tuple((p.name, p.default) for p in ps if p.name in PORT_NAMES),
            required=tuple(p.name for p in state if not p.optional),
            optional=tuple((p.name, p.default) for p in state if p.optional),
        )


class _Engine:
    """One walk through one workflow."""

    def __init__(self, config: RunConfig, adapters: Mapping[str, Any], context: RunContext) -> None:
        self._config = config
        self._adapters = adapters
        self._context = context
        self._binders: dict[Callable[..., Any], _Binder] = {}
        self._compensations: list[tuple[Callable[..., Any], dict[str, Any], str]] = []
        self._group: anyio.abc.TaskGroup

    async def run(self, workflow: Workflow) -> dict[str, Any]:
        """Run the workflow's body as the outermost block."""
        frame = _Frame({}, self._config, workflow.name, {}, self._config.durability == "behind")
        failure: Exception | None = None
        async with anyio.create_task_group() as self._group:
            try:
                await self._block(workflow.body, frame)
            except Exception as error:  # noqa: BLE001 - raised below, outside the group that would wrap it
                failure = error
        if failure is None:
            return frame.values
        if self._config.on_failure == "rollback":
            await self._compensate(failure)
        raise failure

    # -- blocks and nodes -----------------------------------------------------------------------------------------

    async def _block(self, nodes: Sequence[Node], frame: _Frame) -> None:
        """Run nodes and close, newest first, the resources they opened, whatever happened."""
        if not _opens_resources(nodes):
            await self._nodes(nodes, frame)
            return
        block, outer, behind = _Block(), frame.block, frame.behind
        frame.block = block
        failure: BaseException | None = None
        try:
            with block.scope:
                await self._nodes(nodes, frame)
        except BaseException as error:
            failure = error
            raise
        finally:
            with anyio.CancelScope(shield=True):
                errors = await self._close_all(block, frame)
            frame.block, frame.behind = outer, behind
            _report(errors, failure)

    async def _nodes(self, nodes: Sequence[Node], frame: _Frame) -> None:
        for node in nodes:
            if isinstance(node, Step):
                await self._step(node, frame)
            elif isinstance(node, When):
                await self._nodes(node.body if self._call(node.test, frame) else node.otherwise, frame)
            elif isinstance(node, Loop):
                await self._loop(node, frame)
            elif isinstance(node, Parallel):
                await self._parallel(node, frame)
            else:
                await self._nested(node, frame)

    async def _loop(self, node: Loop, frame: _Frame) -> None:
        items = self._call(node.over, frame)
        prefix, turns, index = frame.prefix, frame.turns, 0
        try:
            async for item in _each(items, f"{prefix}/{node.name}"):
                frame.prefix = f"{prefix}/{node.name}[{index}]"
                frame.turns = {**turns, node.name: index}
                frame.values[node.name] = item
                await self._block(node.body, frame)
                if node.until is not None and self._call(node.until, frame):
                    break
                index += 1
                await anyio.lowlevel.checkpoint()
        finally:
            frame.prefix, frame.turns = prefix, turns
            frame.values.pop(node.name, None)

    async def _parallel(self, node: Parallel, frame: _Frame) -> None:
        failures: list[Exception] = []
        forks = [frame.fork() for _ in node.branches]
        limiter = anyio.CapacityLimiter(node.limit or max(1, len(node.branches)))

        async def branch(nodes: Sequence[Node], fork: _Frame) -> None:
            try:
                async with limiter:
                    await self._block(nodes, fork)
            except Exception as error:  # noqa: BLE001 - the first is raised after the join, the rest noted
                fork.values = frame.values
                failures.append(error)
                if node.on_error == "halt":
                    group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for nodes, fork in zip(node.branches, forks, strict=True):
                group.start_soon(branch, nodes, fork)
        if failures and node.on_error == "halt":
            _note(failures[0], failures[1:])
            raise failures[0]
        before = dict(frame.values)
        for fork in forks:
            frame.values |= {n: v for n, v in fork.values.items() if n not in before or before[n] is not v}

    async def _nested(self, node: Workflow, frame: _Frame) -> None:
        inner = frame.fork()
        inner.config = nested_config(node, frame.config)
        inner.prefix = f"{frame.prefix}/{node.name}"
        await self._block(node.body, inner)
        frame.values |= {name: inner.values[name] for name in node.returns}

    # -- stages ---------------------------------------------------------------------------------------------------

    async def _step(self, step: Step, frame: _Frame) -> None:
        path, attempt = f"{frame.prefix}/{step.name}", 1
        began = anyio.current_time()
        while True:
            self._began(step.name, path, attempt)
            try:
                value = await self._attempt(step, frame, path, attempt)
                break
            except Exception as error:
                failure = _as_ours(error, path)
                if await self._try_again(step, failure, error, path, attempt, began):
                    attempt += 1
                    continue
                if step.on_error == "skip":
                    return
                if failure is error:
                    raise
                raise failure from (failure.__cause__ or error)
        if step.writes is not None:
            frame.values[step.writes] = value
        if step.hooks.rollback is not None:
            kwargs = self._arguments(step.hooks.rollback, frame, path, attempt)
            self._compensations.append((step.hooks.rollback, kwargs, path))
        self._ended(step.name, path, began)
        if not frame.behind:
            await self._context.recorder.sync()

    async def _try_again(
        self, step: Step, failure: CrucibleError, error: Exception, path: str, attempt: int, began: float
    ) -> bool:
        """Report a failed try; return whether there is another one, after the pause before it."""
        if step.retry is None or not step.retry.allows(_leaves(error)[0], attempt):
            self._errored(step.name, path, failure, step.on_error, began, attempt)
            return False
        self._errored(step.name, path, failure, "retry", began, attempt)
        uniform = random.Random(seed_of(self._context.seed, path, f"retry{attempt}")).random()
        await anyio.sleep(step.retry.pause(attempt, uniform))
        return True

    def _errored(
        self, stage: str, path: str, error: CrucibleError, action: str, began: float, attempt: int = 1
    ) -> None:
        taken = anyio.current_time() - began
        self._context.emit(
            StageErrored(
                stage=stage,
                recipe=self._context.recipe,
                path=path,
                attempt=attempt,
                code=error.code,
                message=error.message,
                action=action,
                duration_s=taken,
            )
        )

    def _began(self, stage: str, path: str, attempt: int = 1) -> float:
        self._context.emit(StageStart(stage=stage, recipe=self._context.recipe, path=path, attempt=attempt))
        return anyio.current_time()

    def _ended(self, stage: str, path: str, began: float) -> None:
        taken = anyio.current_time() - began
        self._context.emit(StageStop(stage=stage, recipe=self._context.recipe, path=path, duration_s=taken))

    async def _attempt(self, step: Step, frame: _Frame, path: str, attempt: int) -> Any:
        timeout = frame.config.stage_timeout if isinstance(step.timeout, Unset) else step.timeout
        kwargs = self._arguments(step.fn, frame, path, attempt)
        if isinstance(step, Resource):
            return await self._open(step, frame, path, kwargs, timeout)
        if timeout is None:
            return await step.fn(**kwargs)
        with anyio.CancelScope(deadline=anyio.current_time() + timeout) as scope:
            return await step.fn(**kwargs)
        assert scope.cancelled_caught
        raise StageTimeout(
            f"did not end within {timeout:g} s",
            hint="raise it: stage.with_(timeout=...), or the config key stage_timeout",
        )

    # -- resources ------------------------------------------------------------------------------------------------

    async def _open(
        self, step: Resource[..., Any], frame: _Frame, path: str, kwargs: dict[str, Any], timeout: float | None
    ) -> Any:
        block = frame.block
        assert block is not None
        live = LiveResource(step.name, step.fn(**kwargs), block.scope.cancel)
        value = await live.open(self._group, timeout, frame.config.grace)
        block.live.append((step, path, live))
        capabilities = getattr(value, "capabilities", None)
        if isinstance(capabilities, TrainingCapabilities) and capabilities.recovery == "rollback":
            frame.behind = True  # inside a rollback session's block the record is the checkpoint
        return value

    async def _close_all(self, block: _Block, frame: _Frame) -> list[CrucibleError]:
        """Close a block's resources newest first; return what went wrong, deaths before their time first."""
        errors = [_as_ours(live.error, path) for _, path, live in block.live if live.error is not None]
        for step, path, live in reversed(block.live):
            where = f"{path}/cleanup"
            began = self._began("cleanup", where)
            try:
                await live.close(frame.config.grace)
            except CrucibleError as error:
                errors.append(error.at(path))
                self._errored("cleanup", where, error, "halt", began)
            else:
                self._ended("cleanup", where, began)
            if step.writes is not None:
                frame.values.pop(step.writes, None)
        return errors

    async def _compensate(self, failure: Exception) -> None:
        """Run the compensations of what had been done, newest first, shielded and bounded."""
        for hook, kwargs, path in reversed(self._compensations):
            where, grace = f"{path}/rollback", self._config.grace
            began = self._began("rollback", where)
            error: Exception | None = None
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + grace) as scope:
                try:
                    await hook(**kwargs)
                except Exception as raised:  # noqa: BLE001 - the failure of the run is the one reported
                    error = raised
            if scope.cancelled_caught:
                error = StageTimeout(f"did not end within {grace:g} s")
            if error is None:
                self._ended("rollback", where, began)
            else:
                ours = _as_ours(error, where)
                _note(failure, [ours])
                self._errored("rollback", where, ours, "skip", began)

    # -- injection ------------------------------------------------------------------------------------------------

    def _arguments(self, fn: Callable[..., Any], frame: _Frame, path: str, attempt: int) -> dict[str, Any]:
        binder = self._binders.get(fn)
        if binder is None:
            binder = self._binders[fn] = _Binder.of(fn)
        values = frame.values
        arguments = {name: values[name] for name in binder.required}
        for name, default in binder.optional:
            arguments[name] = values.get(name, default)
        for name, default in binder.ports:
            adapter = self._adapters.get(name)
            arguments[name] = default if adapter is None else adapter
        if binder.config:
            arguments["config"] = frame.config
        if binder.run:
            arguments["run"] = Run(self._context, path, frame.turns, attempt)
        return arguments

    def _call(self, selector: Callable[..., Any], frame: _Frame) -> Any:
        """Evaluate a selector: a plain pure function."""
        name = getattr(selector, "__name__", "selector")
        path = f"{frame.prefix}/{name}"
        try:
            return selector(**self._arguments(selector, frame, path, 1))
        except Exception as error:  # noqa: BLE001 - user code; raised again with its place
            failure = _as_ours(error, path)
            raise failure from (failure.__cause__ or error)


def _opens_resources(nodes: Sequence[Node]) -> bool:
    """Return whether a block itself opens resources: those in loops, branches and nested workflows have their own."""
    for node in nodes:
        if isinstance(node, Resource):
            return True
        if isinstance(node, When) and _opens_resources(node.body + node.otherwise):
            return True
    return False


async def _each(items: Any, path: str) -> AsyncIterator[Any]:
    """Iterate over what a loop's ``over`` gave."""
    if isinstance(items, Positioned):
        async for item in items:
            yield item
    elif isinstance(items, Sequence) or (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        for index in range(len(items)):
            yield items[index]
    else:
        raise StageFailed(
            f"cannot loop over a {type(items).__name__}", hint="give a Sequence, a range or a Positioned", where=path
        )


def _as_ours(error: BaseException, path: str) -> CrucibleError:
    """Return the error of our tree that a failure is, with its place; groups become their first member."""
    first, rest = _leaves(error)
    if isinstance(first, CrucibleError):
        ours = first.at(path)
    else:
        text = str(first)
        shown = text if len(text) <= 300 else text[:300] + "..."
        ours = StageFailed(f"{type(first).__name__}: {shown}" if shown else type(first).__name__, where=path)
        ours.__cause__ = first
    _note(ours, rest)
    return ours


def _leaves(error: BaseException) -> tuple[BaseException, list[BaseException]]:
    """Take a group apart: the member to report (one of our tree if there is one), and the others."""
    if not isinstance(error, BaseExceptionGroup):
        return error, []
    flat: list[BaseException] = []
    for member in error.exceptions:
        first, rest = _leaves(member)
        flat += [first, *rest]
    flat.sort(key=lambda e: not isinstance(e, CrucibleError))
    return flat[0], flat[1:]


def _note(error: BaseException, others: Sequence[BaseException]) -> None:
    """Attach what failed besides to the failure that is reported."""
    for other in others:
        note = f"also failed: {type(other).__name__}: {other}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def _report(errors: Sequence[CrucibleError], failure: BaseException | None) -> None:
    """Raise what went wrong with resources, or attach it to the failure that is on its way already."""
    if not errors:
        return
    if failure is not None:
        _note(failure, errors)
        return
    _note(errors[0], errors[1:])
    raise errors[0]
