"""Seeded schedules: trio decides by the seed which task runs next, actors delay, fail and hang by it; laws must hold.

A failing seed stands in the name of the test that failed.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from crucible_kitchen.actors import Actor, ChildSpec, Restarts, SupervisorSpec, supervise
from crucible_kitchen.errors import ActorError, MessageQuarantined
from crucible_kitchen.testing.clock import seeded_schedule, virtual_clock

SEEDS = 60
CLIENTS, ASKS, CAPACITY = 4, 12, 3


@dataclass
class History:
    """What happened, in order."""

    rng: random.Random
    lines: list[tuple[float, str]] = field(default_factory=list)
    done: dict[tuple[str, int, int], int] = field(default_factory=lambda: defaultdict(int))
    tried: dict[tuple[str, int, int], int] = field(default_factory=lambda: defaultdict(int))
    order: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    quarantined: list[Any] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.lines.append((anyio.current_time(), line))


class Worker(Actor[tuple[str, int, int], tuple[str, int, int]]):
    """Waits, fails, or hangs in a shield past its grace, by the seed."""

    def __init__(self, history: History) -> None:
        self.history = history

    async def start(self) -> None:
        await anyio.sleep(self.history.rng.random())

    async def handle(self, message: tuple[str, int, int]) -> tuple[str, int, int]:
        history = self.history
        history.tried[message] += 1
        history.note(f"try {message}")
        luck = history.rng.random()
        with anyio.CancelScope(shield=luck > 0.97):  # the supervisor will not wait for it
            await anyio.sleep(history.rng.choice([0, 0.1, 1, 5]))
        if luck < 0.1:
            raise RuntimeError
        history.done[message] += 1
        return message


async def client(tree: Any, history: History, number: int) -> None:
    for i in range(ASKS):
        path = history.rng.choice(["a", "inner/b", "inner/c"])
        message = (path, number, i)
        with anyio.move_on_after(history.rng.choice([0, 2, 30, 1000])) as scope:
            try:
                reply = await tree.ref(path).call(message)
            except MessageQuarantined:
                history.note(f"quarantined {message}")
                continue
            assert reply.value == message
            assert history.done[message] >= 1
            history.order[path, number].append(reply.epoch)
            history.note(f"reply {message} of {reply.epoch}")
        if scope.cancelled_caught:
            history.note(f"gave up {message}")


async def watch(tree: Any, history: History) -> None:
    while True:
        for row in tree.statistics():
            assert row.depth <= CAPACITY
            assert row.waiting <= CLIENTS
        if history.rng.random() < 0.1:
            tree.ref(history.rng.choice(["a", "inner/b"])).kill("by chance")
        await anyio.sleep(0.5)


async def simulate(seed: int) -> History:
    history = History(random.Random(seed))

    def spec(name: str) -> ChildSpec[Any, Any]:
        return ChildSpec(name, lambda: Worker(history), capacity=CAPACITY, grace=2)

    restarts = Restarts(most=2000, within=100_000, initial=0.1, longest=10)
    inner = SupervisorSpec("inner", (spec("b"), spec("c")), "rest_for_one", restarts, seed)
    root = SupervisorSpec("root", (spec("a"), inner), restarts=restarts, seed=seed)
    before = {task.id for task in anyio.get_running_tasks()}
    try:
        async with supervise(root, quarantine=history.quarantined.append) as tree, anyio.create_task_group() as group:
            group.start_soon(watch, tree, history)
            async with anyio.create_task_group() as clients:
                for number in range(CLIENTS):
                    clients.start_soon(client, tree, history, number)
            group.cancel_scope.cancel()
    except ActorError as error:  # nothing here may make the root give up
        raise AssertionError(str(error)) from error
    except anyio.get_cancelled_exc_class():
        raise
    assert {task.id for task in anyio.get_running_tasks()} == before
    for statistics in tree.statistics():
        assert (statistics.depth, statistics.waiting, statistics.state) == (0, 0, "stopped")
    return history


def run(seed: int) -> History:
    name, options = virtual_clock()
    with seeded_schedule(seed):
        return anyio.run(simulate, seed, backend=name, backend_options=options)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_laws_hold_under_any_schedule(seed: int) -> None:
    history = run(seed)
    for epochs in history.order.values():
        assert epochs == sorted(epochs), "a reply of an older incarnation came after one of a newer"
    assert all(q.deaths == 2 for q in history.quarantined)
    poison = {q.message for q in history.quarantined}
    answered = {line for _, line in history.lines if line.startswith("reply")}
    assert not any(f"reply {message} of" in line for message in poison for line in answered)


def test_a_seed_is_a_schedule() -> None:
    first, again, other = run(1), run(1), run(2)
    assert first.lines == again.lines != other.lines
