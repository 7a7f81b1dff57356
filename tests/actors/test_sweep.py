"""Cancelled, or failing, at every single point of a tree's life: all that started has stopped, nothing is left."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.actors import Actor, ChildSpec, Restarts, Supervisor, SupervisorSpec, supervise
from crucible_kitchen.errors import ActorStopped, CleanupError, CrucibleError, MessageQuarantined

pytestmark = pytest.mark.anyio


class World:
    """A tree whose every checkpoint calls ``at``, and a count of what it started and stopped."""

    def __init__(self, at: Callable[[int], None], most: int = 10) -> None:
        self.at = at
        self.most = most
        self.points = 0
        self.started: Counter[str] = Counter()
        self.stopped: Counter[str] = Counter()
        self.cells: list[Any] = []

    async def point(self) -> None:
        self.points += 1
        self.at(self.points)
        await anyio.lowlevel.checkpoint()

    def spec(self, name: str) -> ChildSpec[str, str]:
        world = self

        class Member(Actor[str, str]):
            async def start(self) -> None:
                world.started[name] += 1
                await world.point()

            async def handle(self, message: str) -> str:
                await world.point()
                if message == "die":
                    raise RuntimeError
                return message

            async def stop(self) -> None:
                world.stopped[name] += 1
                await anyio.lowlevel.checkpoint()

        return ChildSpec(name, Member, capacity=1, quarantine_after=1)

    def tree(self) -> SupervisorSpec:
        restarts = Restarts(most=self.most, initial=0)
        inner = SupervisorSpec("inner", (self.spec("b"), self.spec("c")), "rest_for_one", restarts)
        return SupervisorSpec("root", (self.spec("a"), inner, self.spec("d")), restarts=restarts)

    async def live(self) -> None:
        async with supervise(self.tree()) as tree:
            self.cells = list(tree._cells())
            await self.work(tree)

    async def work(self, tree: Supervisor) -> None:
        async def ask(path: str, message: str) -> None:
            try:
                assert await tree.ref(path).ask(message) == message
            except (ActorStopped, MessageQuarantined):
                return

        async with anyio.create_task_group() as group:
            for path in ("a", "inner/b", "inner/c", "d"):
                for message in ("x", "y", "die" if path == "inner/b" else "z"):
                    group.start_soon(ask, path, message)
        await tree.start(self.spec("late"))
        await tree.ref("late").tell("last")

    def assert_clean(self) -> None:
        assert self.started == self.stopped
        assert all((c.mailbox.depth, c.mailbox.waiting, c.incarnation) == (0, 0, None) for c in self.cells)


async def undisturbed(kit: Any) -> int:
    world = World(lambda _: None)
    async with kit.nothing_left():
        await world.live()
    world.assert_clean()
    assert world.started == {"a": 1, "b": 2, "c": 2, "d": 1, "late": 1}
    return world.points


async def test_cancelled_at_every_checkpoint_of_an_actor(kit: Any) -> None:
    for k in range(1, await undisturbed(kit) + 1):
        scope = anyio.CancelScope()
        world = World(lambda n, k=k, scope=scope: scope.cancel() if n == k else None)  # type: ignore[misc]
        async with kit.nothing_left():
            with scope:
                await world.live()
        world.assert_clean()


async def test_cancelled_at_every_turn_of_the_event_loop(kit: Any) -> None:
    turns, completed = 0, False

    async def cancel_after(turns: int, scope: anyio.CancelScope) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    while not completed:
        turns += 1
        world = World(lambda _: None)
        async with kit.nothing_left(), anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                group.start_soon(cancel_after, turns, scope)
                await world.live()
                completed = True
            group.cancel_scope.cancel()
        world.assert_clean()
    assert turns > 15


@pytest.mark.parametrize("most", [0, 10])
async def test_failing_at_every_checkpoint_of_an_actor(kit: Any, most: int) -> None:
    class Injected(Exception):
        pass

    def fail(k: int) -> Callable[[int], None]:
        def at(n: int) -> None:
            if n == k:
                raise Injected

        return at

    for k in range(1, await undisturbed(kit) + 1):
        world, failure = World(fail(k), most), None
        async with kit.nothing_left():
            try:
                await world.live()
            except* CrucibleError as errors:
                failure = errors.exceptions[0]
        world.assert_clean()
        if most == 0:
            assert failure is not None
        else:  # one failure more is restarted like the others, but at the very end there is nobody to do so
            assert failure is None or isinstance(failure, CleanupError)
