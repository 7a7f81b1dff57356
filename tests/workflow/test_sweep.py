"""Cancelled, or failing, at every single point of a run: everything that was opened is closed once, nothing is left."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow
from crucible_kitchen.workflow.stage import Retry, stage

pytestmark = pytest.mark.anyio


class World:
    """A workflow whose every checkpoint calls ``at``, and a count of what it opened and closed."""

    def __init__(self, at: Callable[[int], None]) -> None:
        self.at = at
        self.points = 0
        self.opened: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.yielded: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()

    async def point(self) -> None:
        self.points += 1
        self.at(self.points)
        await anyio.lowlevel.checkpoint()

    def resource(self, name: str) -> Any:
        async def body() -> AsyncIterator[str]:
            await self.point()
            self.opened[name] += 1
            try:
                await self.point()
                self.yielded[name] += 1
                yield name
            finally:
                self.closed[name] += 1
                await self.point()
                self.completed[name] += 1

        return stage(name=name, writes=name)(body)

    def pool(self, name: str) -> Any:
        """A resource with a task of its own around its yield."""

        async def work() -> None:
            await anyio.sleep_forever()

        async def body() -> AsyncIterator[str]:
            async with anyio.create_task_group() as group:
                group.start_soon(work)
                self.opened[name] += 1
                try:
                    self.yielded[name] += 1
                    yield name
                finally:
                    self.closed[name] += 1
                    await self.point()
                    self.completed[name] += 1
                    group.cancel_scope.cancel()

        return stage(name=name, writes=name)(body)

    def step(self, name: str, **options: Any) -> Any:
        async def body() -> str:
            await self.point()
            await self.point()
            return name

        return stage(name=name, writes=f"of_{name}", timeout=50, **options)(body)

    def workflow(self) -> Workflow:
        retry = Retry(attempts=2, initial=0, on=(ValueError,))
        return Workflow(
            "w",
            self.resource("a"),
            self.pool("b"),
            Loop("i", lambda: range(2), self.resource("turn"), self.step("in_loop", retry=retry)),
            When(lambda: True, self.resource("c")),
            Parallel(
                [self.resource("left"), self.step("l1"), self.step("l2", on_error="skip")],
                [self.pool("right"), Loop("j", lambda: range(2), self.step("r1"))],
                [Workflow("nested", self.resource("inner"), self.step("n1"), returns=["of_n1"])],
            ),
            self.step("end"),
        )

    def assert_clean(self) -> None:
        assert self.opened == self.closed
        assert not self.yielded - self.completed, "a clean-up was cut off"


async def total_points(run_workflow: Any) -> int:
    world = World(lambda _: None)
    await run_workflow(world.workflow())
    world.assert_clean()
    assert sum(world.opened.values()) == 8
    return world.points


async def test_cancelled_at_every_checkpoint_of_a_stage_or_resource(run_workflow: Any, log: Any) -> None:
    total = await total_points(run_workflow)
    for k in range(1, total + 1):
        log.records.clear()
        scope = anyio.CancelScope()
        world = World(lambda n, k=k, scope=scope: scope.cancel() if n == k else None)  # type: ignore[misc]
        with scope:
            await run_workflow(world.workflow())
        world.assert_clean()
        assert scope.cancelled_caught or k > total - 3, k  # the last points are those of the shielded clean-up
        begun = [line for line in log.lines if line.endswith("/cleanup")]
        assert len(begun) % 2 == 0, begun


async def test_cancelled_at_every_turn_of_the_event_loop(run_workflow: Any) -> None:
    turns, completed = 0, False

    async def cancel_after(turns: int, scope: anyio.CancelScope) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    while not completed:
        turns += 1
        world = World(lambda _: None)
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                group.start_soon(cancel_after, turns, scope)
                await run_workflow(world.workflow())
                completed = True
            group.cancel_scope.cancel()
        world.assert_clean()
    assert turns > 30


async def test_failing_at_every_checkpoint_of_a_stage_or_resource(run_workflow: Any) -> None:
    class Injected(Exception):
        pass

    def fail(k: int) -> Callable[[int], None]:
        def at(n: int) -> None:
            if n == k:
                raise Injected(str(k))

        return at

    for k in range(1, await total_points(run_workflow) + 1):
        world = World(fail(k))
        failure: CrucibleError | None = None
        try:
            await run_workflow(world.workflow())
        except CrucibleError as error:
            failure = error
        assert failure is None or isinstance(failure.__cause__, Injected), k
        assert world.opened == world.closed


async def test_a_stage_that_swallows_its_cancellation_does_not_escape_it(run_workflow: Any) -> None:
    after = []

    @stage()
    async def swallows() -> None:
        with contextlib.suppress(BaseException):
            await anyio.sleep_forever()

    @stage()
    async def next_one() -> None:
        after.append(1)

    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            group.start_soon(_cancel_when_blocked, scope)
            await run_workflow(Workflow("w", swallows, next_one))
        assert scope.cancelled_caught
        scope = anyio.CancelScope()
        with scope:
            group.start_soon(_cancel_when_blocked, scope)
            await run_workflow(Workflow("w", swallows))
        assert scope.cancelled_caught
    assert after == []


async def _cancel_when_blocked(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()
