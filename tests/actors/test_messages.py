"""Asking and telling: order, bounds, cancellation, epochs, and what an asker hears of a death."""

import gc
import tracemalloc
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.actors import Actor, ChildSpec, Quarantined
from crucible_kitchen.errors import ActorRestarted, ActorStopped, MessageQuarantined

pytestmark = pytest.mark.anyio


class Recorder(Actor[Any, int]):
    """Keeps the order in which messages came; waits for the gate, if it has one."""

    def __init__(self, seen: list[Any], gate: anyio.Event | None = None) -> None:
        self.seen = seen
        self.gate = gate

    async def handle(self, message: Any) -> int:
        if self.gate is not None:
            await self.gate.wait()
        self.seen.append(message)
        return len(self.seen)


async def test_an_ask_returns_what_the_actor_replied(kit: Any) -> None:
    async with kit.one(ChildSpec("counter", lambda: Recorder([]))) as (_, counter):
        assert [await counter.ask(x) for x in "abc"] == [1, 2, 3]
        assert counter.path == "root/counter"


async def test_messages_of_one_sender_are_handled_in_the_order_in_which_they_were_sent(kit: Any) -> None:
    seen: list[Any] = []
    async with kit.one(ChildSpec("a", lambda: Recorder(seen), capacity=2)) as (_, ref):
        for i in range(20):
            await ref.tell(i)
        assert await ref.ask("last") == 21
    assert seen == [*range(20), "last"]


async def test_a_full_mailbox_makes_its_senders_wait_and_lets_them_in_by_turns(kit: Any) -> None:
    seen: list[Any] = []
    gate = anyio.Event()
    async with kit.one(ChildSpec("a", lambda: Recorder(seen, gate), capacity=2)) as (tree, ref):
        async with anyio.create_task_group() as group:
            for i in range(6):
                group.start_soon(ref.ask if i % 2 else ref.tell, i)
                await anyio.wait_all_tasks_blocked()
                (row,) = tree.statistics()
                assert (row.depth, row.waiting) == (min(max(i, 0), 2), max(0, i - 2))
            gate.set()
    assert seen == [0, 1, 2, 3, 4, 5]


async def test_a_cancelled_ask_frees_its_place_whether_it_waited_for_room_or_for_the_reply(kit: Any) -> None:
    seen: list[Any] = []
    gate = anyio.Event()
    async with kit.one(ChildSpec("a", lambda: Recorder(seen, gate), capacity=1)) as (tree, ref):
        scopes = [anyio.CancelScope() for _ in range(4)]

        async def ask(i: int) -> None:
            with scopes[i]:
                await ref.ask(i)

        async with anyio.create_task_group() as group:
            for i in range(4):  # 0 in hand, 1 in the mailbox, 2 and 3 wait for room
                group.start_soon(ask, i)
                await anyio.wait_all_tasks_blocked()
            scopes[1].cancel()
            await anyio.wait_all_tasks_blocked()
            assert [(s.depth, s.waiting) for s in tree.statistics()] == [(1, 1)]
            scopes[3].cancel()
            await anyio.wait_all_tasks_blocked()
            assert [(s.depth, s.waiting) for s in tree.statistics()] == [(1, 0)]
            scopes[0].cancel()  # in hand: handled to its end, for nobody
            await anyio.wait_all_tasks_blocked()
            gate.set()
    assert seen == [0, 2]


async def test_a_cancelled_tell_that_waited_for_room_is_not_delivered(kit: Any) -> None:
    seen: list[Any] = []
    gate = anyio.Event()
    async with kit.one(ChildSpec("a", lambda: Recorder(seen, gate), capacity=1)) as (_, ref):
        await ref.tell(0)
        await anyio.wait_all_tasks_blocked()
        await ref.tell(1)
        async with anyio.create_task_group() as group:
            group.start_soon(ref.tell, 2)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        gate.set()
    assert seen == [0, 1]


async def test_an_actor_that_died_handles_the_message_again_before_those_behind_it(kit: Any) -> None:
    seen: list[Any] = []
    born: list[int] = []

    class Flaky(Actor[str, str]):
        def __init__(self) -> None:
            born.append(1)

        async def handle(self, message: str) -> str:
            await anyio.lowlevel.checkpoint()
            if message == "first" and len(born) == 1:
                raise kit.Died
            seen.append(message)
            return message

    async with kit.one(ChildSpec("a", Flaky)) as (tree, ref):
        replies = {}

        async def ask(message: str) -> None:
            replies[message] = await ref.call(message)

        async with anyio.create_task_group() as group:
            for message in ("first", "second"):
                group.start_soon(ask, message)
                await anyio.lowlevel.checkpoint()
        (row,) = tree.statistics()
    assert sorted(seen) == ["first", "second"]
    assert {r.epoch for r in replies.values()} == {2}
    assert (row.restarts, row.handled, type(row.last_error)) == (1, 2, kit.Died)


@pytest.mark.parametrize("times", [1, 2, 4])
async def test_a_message_that_killed_its_actor_so_often_is_quarantined_and_not_delivered_again(
    kit: Any, times: int
) -> None:
    handled: list[str] = []
    kept: list[Quarantined] = []
    told: list[str] = []

    async def poison() -> None:
        handled.append("poison")
        raise kit.Died

    spec = kit.scripted(quarantine_after=times)
    async with kit.one(spec, quarantine=kept.append, warn=lambda code, _: told.append(code)) as (tree, ref):
        with pytest.raises(MessageQuarantined) as caught:
            await ref.ask(poison)
        assert await ref.ask(kit.pong) == "pong"
        (row,) = tree.statistics()
    assert isinstance(caught.value.__cause__, kit.Died)
    assert [(q.path, q.message, q.deaths) for q in kept] == [("root/a", poison, times)]
    assert len(handled) == times == row.restarts
    assert row.quarantined == 1
    assert sorted(told) == sorted(["actor.died"] * times + ["actor.quarantined"])


async def test_a_told_message_that_kills_is_quarantined_too(kit: Any) -> None:
    kept: list[Quarantined] = []
    async with kit.one(kit.scripted(), quarantine=kept.append) as (_, ref):
        await ref.tell(kit.die)
        assert await ref.ask(kit.pong) == "pong"
    assert [q.deaths for q in kept] == [2]


async def test_a_message_for_one_incarnation_is_refused_by_the_next(kit: Any) -> None:
    async with kit.one(kit.scripted(quarantine_after=1)) as (_, ref):
        assert ref.epoch == 1
        assert await ref.ask(kit.pong, epoch=1) == "pong"
        with pytest.raises(MessageQuarantined):
            await ref.ask(kit.die)
        with pytest.raises(ActorRestarted):
            await ref.ask(kit.pong, epoch=1)
        assert await ref.call(kit.pong, epoch=2) == ("pong", 2)


async def test_a_late_reply_of_an_incarnation_that_ignored_its_end_is_dropped(kit: Any) -> None:
    late = anyio.Event()
    entered = []

    async def stubborn() -> int:
        entered.append(1)
        if len(entered) == 1:
            with anyio.CancelScope(shield=True):
                await late.wait()
        return len(entered)

    async with kit.one(kit.scripted(grace=0.01)) as (tree, ref):
        replies = []

        async def ask() -> None:
            replies.append(await ref.call(stubborn))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            ref.kill("it hangs")
        assert replies == [(2, 2)], "the second incarnation answered while the first still hung"
        late.set()
        await anyio.wait_all_tasks_blocked()
        (row,) = tree.statistics()
        assert (row.stale, row.handled, row.epoch) == (1, 1, 2)
        assert await ref.ask(kit.pong) == "pong"


async def test_who_asks_a_stopped_actor_is_told_so_with_its_last_error(kit: Any) -> None:
    async with kit.one(kit.scripted(restart="temporary", quarantine_after=1)) as (tree, ref):
        with pytest.raises(MessageQuarantined):
            await ref.ask(kit.die)
        for call in (ref.ask, ref.tell, ref.call):
            with pytest.raises(ActorStopped) as caught:
                await call(kit.pong)
            assert isinstance(caught.value.__cause__, kit.Died)
        assert tree.statistics() == ()
    with pytest.raises(ActorStopped):
        await ref.ask(kit.pong)


async def test_memory_stays_flat_over_a_hundred_thousand_messages_to_a_slow_actor(kit: Any, anyio_backend: Any) -> None:
    if anyio_backend != "asyncio":
        pytest.skip("one event loop is enough: the mailbox is the same")
    marks: list[int] = []
    depths: set[int] = set()

    class Slow(Actor[int, None]):
        async def handle(self, message: int) -> None:
            if message % 10 == 0:  # far slower than who tells it
                await anyio.lowlevel.checkpoint()
            if message in (20_000, 100_000):
                gc.collect()
                marks.append(tracemalloc.get_traced_memory()[0])

    async with kit.one(ChildSpec("slow", Slow, capacity=8)) as (_, ref):
        tracemalloc.start()
        for i in range(100_001):
            await ref.tell(i)
            depths.add(ref._cell.mailbox.depth)
        await ref.ask(-1)
        tracemalloc.stop()
    assert max(depths) == 8
    assert marks[1] - marks[0] < 20_000


async def test_an_actor_has_its_own_instance_per_incarnation(kit: Any) -> None:
    class Counter(kit.Scripted):
        count = 0

        async def handle(self, message: Any) -> Any:
            self.count += 1
            return self.count if message is kit.pong else await message()

    async with kit.one(kit.scripted(factory=Counter, quarantine_after=1)) as (_, ref):
        assert [await ref.ask(kit.pong), await ref.ask(kit.pong)] == [1, 2]
        with pytest.raises(MessageQuarantined):
            await ref.ask(kit.die)
        assert await ref.ask(kit.pong) == 1
