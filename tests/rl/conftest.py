"""What the tests of rollouts share: event loops, groups that are nothing but a time, a guard against leftovers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from crucible_kitchen.rl.pipeline import Rollouts
from crucible_kitchen.rl.plan import PipelinePlan
from crucible_kitchen.rl.trajectories import Ticket
from crucible_kitchen.testing.clock import virtual_clock


@pytest.fixture(params=["virtual"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Trio with a clock that jumps."""
    return virtual_clock() if request.param == "virtual" else request.param


class Group:
    """A group that only has a version and a length in seconds."""

    def __init__(self, ticket: Ticket, version: int, seconds: float, unusable: str | None = None) -> None:
        self.ticket = ticket
        self.version = version
        self.seconds = seconds
        self.unusable = unusable
        self.carried = None if unusable else {"after": ticket.index}
        self.length = 1

    def versions(self) -> Any:
        return np.array([self.version], dtype=np.int32)


class Load:
    """Rollouts that take log-normal times; ``fails`` says what becomes of an attempt."""

    def __init__(self, *, mean: float = 0.05, sigma: float = 1.0, seed: int = 0, fails: Any = None) -> None:
        self.mu = np.log(mean) - sigma**2 / 2
        self.sigma = sigma
        self.seed = seed
        self.fails = fails
        self.attempts: dict[int, int] = {}
        self.carried: dict[int, Any] = {}
        self.running = self.most_running = 0
        self.rollouts: Rollouts[Group]

    def seconds(self, index: int) -> float:
        rng = np.random.Generator(np.random.Philox(key=self.seed * 2**32 + index))
        return float(np.exp(self.mu + self.sigma * rng.standard_normal()))

    async def __call__(self, ticket: Ticket) -> Group:
        attempt = self.attempts[ticket.index] = self.attempts.get(ticket.index, 0) + 1
        self.carried[ticket.index] = ticket.carried
        version, seconds = self.rollouts.version, self.seconds(ticket.index)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await anyio.sleep(seconds)
        finally:
            self.running -= 1
        failure = self.fails(ticket, attempt) if self.fails else None
        if isinstance(failure, Exception):
            raise failure
        return Group(ticket, version, seconds, failure)


class Trained:
    """What a learner did: the indices it trained, and their staleness."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.ages: list[int] = []
        self.dropped: dict[int, str] = {}

    @property
    def indices(self) -> list[int]:
        return [index for batch in self.batches for index in batch]


def pipeline(load: Load, plan: PipelinePlan, trained: Trained | None = None, **options: Any) -> Rollouts[Group]:
    dropped = trained.dropped.__setitem__ if trained is not None else lambda _i, _w: None
    load.rollouts = Rollouts(plan, order=lambda index: index, dropped=dropped, **options)
    return load.rollouts


async def learn(
    rollouts: Rollouts[Group],
    load: Load,
    trained: Trained,
    *,
    seconds: float = 0.05,
    streaming: bool = True,
    until: int | None = None,
) -> Any:
    """Run the rollouts with a learner of so many seconds per batch; stop after ``until`` batches with a position."""
    async with rollouts.running(load):
        async for batch in rollouts:
            if len(batch):
                if streaming:
                    async for group in batch:
                        trained.ages.append(batch.update - group.version)
                        await anyio.sleep(seconds / len(batch))
                else:
                    trained.ages += [batch.update - group.version for group in await batch.all()]
                    await anyio.sleep(seconds)
                trained.batches.append([group.ticket.index for group in batch.groups])
                batch.trained()
            rollouts.check()
            if until is not None and len(trained.batches) == until:
                return rollouts.position()
    return None


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Fail if the block leaves a task."""
    before = {task.id for task in anyio.get_running_tasks()}
    yield
    left = [task for task in anyio.get_running_tasks() if task.id not in before]
    assert not left, f"tasks left behind: {left}"


@pytest.fixture
def kit() -> Any:
    """What stands in this file, for tests, which cannot import it."""
    return SimpleNamespace(**globals())
