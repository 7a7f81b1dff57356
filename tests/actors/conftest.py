"""What the actors' tests share: three event loops, actors that do as the message says, a guard against leftovers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.actors import Actor, ChildSpec, Restarts, SupervisorSpec, supervise
from crucible_kitchen.testing.clock import virtual_clock

EAGER = Restarts(most=1000, within=1e6, initial=0)
"""Restart at once, as often as it takes."""


@pytest.fixture(params=["asyncio", "trio", "virtual"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """asyncio, trio, and trio with a clock that jumps: what is true must be true on all three."""
    return virtual_clock() if request.param == "virtual" else request.param


class Scripted(Actor[Callable[[], Awaitable[Any]], Any]):
    """Does what the message says: each message is a coroutine function."""

    async def handle(self, message: Callable[[], Awaitable[Any]]) -> Any:
        return await message()


class Died(Exception):
    """What kills an actor in these tests."""


async def die() -> None:
    raise Died


async def pong() -> str:
    return "pong"


def scripted(name: str = "a", **options: Any) -> ChildSpec[Callable[[], Awaitable[Any]], Any]:
    return ChildSpec(name, options.pop("factory", Scripted), **options)


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Fail if the block leaves a task."""
    before = {task.id for task in anyio.get_running_tasks()}
    yield
    left = [task for task in anyio.get_running_tasks() if task.id not in before]
    assert not left, f"tasks left behind: {left}"


@asynccontextmanager
async def one(spec: ChildSpec[Any, Any], restarts: Restarts = EAGER, **options: Any) -> AsyncIterator[Any]:
    """One actor below a supervisor; gives the tree and the actor's address."""
    async with nothing_left(), supervise(SupervisorSpec("root", (spec,), restarts=restarts), **options) as tree:
        yield tree, tree.ref(spec)


@pytest.fixture
def kit() -> Any:
    """What stands in this file, for tests, which cannot import it."""
    return SimpleNamespace(**globals())
