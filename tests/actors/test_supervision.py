"""Restarts, escalation and stopping: who is restarted with whom, when, how often, and in which order all end."""

from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.actors import Actor, ChildSpec, Restarts, SupervisorSpec, supervise
from crucible_kitchen.errors import (
    ActorError,
    ActorStopped,
    CleanupError,
    ConfigError,
    MessageQuarantined,
    TooManyRestarts,
)

pytestmark = pytest.mark.anyio


class Diary:
    """Makes actors that write down when they start and stop."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def spec(self, name: str, **options: Any) -> ChildSpec[Any, Any]:
        lines = self.lines

        class Written(Actor[Any, Any]):
            async def start(self) -> None:
                await anyio.lowlevel.checkpoint()
                lines.append(f"+{name}")

            async def handle(self, message: Any) -> Any:
                return await message()

            async def stop(self) -> None:
                await anyio.lowlevel.checkpoint()
                lines.append(f"-{name}")

        return ChildSpec(name, Written, quarantine_after=1, **options)


async def kill(ref: Any, message: Callable[..., Any]) -> None:
    with pytest.raises(MessageQuarantined):
        await ref.ask(message)


async def test_one_for_one_restarts_only_the_child_that_died(kit: Any) -> None:
    diary = Diary()
    specs = tuple(diary.spec(name) for name in "abc")
    async with kit.nothing_left(), supervise(SupervisorSpec("root", specs, restarts=kit.EAGER)) as tree:
        await kill(tree.ref("b"), kit.die)
        assert await tree.ref("b").ask(kit.pong) == "pong"
        assert [s.epoch for s in tree.statistics()] == [1, 2, 1]
    assert diary.lines == ["+a", "+b", "+c", "-b", "+b", "-c", "-b", "-a"]


async def test_rest_for_one_restarts_the_child_and_those_after_it_in_order(kit: Any) -> None:
    diary = Diary()
    specs = tuple(diary.spec(name) for name in "abcd")
    spec = SupervisorSpec("root", specs, strategy="rest_for_one", restarts=kit.EAGER)
    async with kit.nothing_left(), supervise(spec) as tree:
        await kill(tree.ref("b"), kit.die)
        assert await tree.ref("d").ask(kit.pong, epoch=2) == "pong"
        assert [s.epoch for s in tree.statistics()] == [1, 2, 2, 2]
    expected = "+a +b +c +d  -b -d -c  +b +c +d  -d -c -b -a"
    assert diary.lines == expected.split()


async def test_a_message_in_the_hands_of_a_child_that_is_restarted_for_another_is_no_poison(kit: Any) -> None:
    entered = []

    async def long() -> int:
        entered.append(1)
        if len(entered) == 1:
            await anyio.sleep_forever()
        return len(entered)

    diary = Diary()
    specs = (diary.spec("a"), diary.spec("b"))
    spec = SupervisorSpec("root", specs, strategy="rest_for_one", restarts=kit.EAGER)
    async with supervise(spec) as tree, anyio.create_task_group() as group:
        replies = []

        async def ask() -> None:
            replies.append(await tree.ref("b").call(long))

        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        await kill(tree.ref("a"), kit.die)
        await tree.ref("b").ask(kit.pong)
        await anyio.wait_all_tasks_blocked()
        assert replies == [(2, 2)]


async def test_a_supervisor_that_gives_up_is_restarted_by_its_parent_with_all_its_children(kit: Any) -> None:
    diary = Diary()
    inner = SupervisorSpec("inner", (diary.spec("a"), diary.spec("b")), restarts=Restarts(most=1, initial=0))
    async with kit.nothing_left(), supervise(SupervisorSpec("root", (inner,), restarts=kit.EAGER)) as tree:
        a, b = tree.ref("inner/a"), tree.ref("inner/b")
        await kill(a, kit.die)
        await kill(b, kit.die)
        assert await a.ask(kit.pong, epoch=3) == "pong"
        assert await b.ask(kit.pong, epoch=2) == "pong"
        await kill(a, kit.die)  # the restarted supervisor has a clean record
        assert await a.ask(kit.pong, epoch=4) == "pong"
        assert await b.ask(kit.pong, epoch=2) == "pong"


async def test_a_child_that_died_and_is_stopped_before_its_supervisor_knows_is_not_restarted(kit: Any) -> None:
    diary = Diary()
    specs = tuple(diary.spec(name) for name in "abc")
    spec = SupervisorSpec("root", specs, strategy="rest_for_one", restarts=kit.EAGER)
    async with kit.nothing_left(), supervise(spec) as tree:
        await kill(tree.ref("b"), kit.die)
        await tree.stop("b")
        assert await tree.ref("c").ask(kit.pong) == "pong"
        assert [s.path for s in tree.statistics()] == ["root/a", "root/c"]
    assert diary.lines.count("+b") == diary.lines.count("-b")


async def test_what_the_root_gives_up_with_is_raised_out_of_the_block_which_is_cancelled(kit: Any) -> None:
    diary = Diary()
    inner = SupervisorSpec("inner", (diary.spec("a"),), restarts=Restarts(most=0))
    spec = SupervisorSpec("root", (diary.spec("z"), inner), restarts=Restarts(most=1, initial=0))
    reached = []
    with pytest.raises(TooManyRestarts) as caught:  # noqa: PT012 - raised as the block is left
        async with kit.nothing_left(), supervise(spec) as tree:
            try:
                await kill(tree.ref("inner/a"), kit.die)
                await kill(tree.ref("inner/a"), kit.die)
                await anyio.sleep_forever()
            finally:
                reached.append("cancelled")
    assert reached == ["cancelled"]
    assert isinstance(caught.value.__cause__, TooManyRestarts)
    assert isinstance(caught.value.__cause__.__cause__, kit.Died)
    assert caught.value.message.startswith("supervisor root: more than 1 deaths in 60 s, the last of root/inner: ")
    assert diary.lines.count("+a") == diary.lines.count("-a") == 2
    assert diary.lines[-1] == "-z"


async def test_who_waits_for_a_reply_when_the_root_gives_up_is_told_that_the_actor_has_stopped(kit: Any) -> None:
    outcome = []
    spec = SupervisorSpec("root", (kit.scripted("a"), kit.scripted("b")), restarts=Restarts(most=0))

    async def outside(ref: Any) -> None:
        try:
            await ref.ask(anyio.sleep_forever)
        except ActorStopped as error:
            outcome.append(error.code)

    async with anyio.create_task_group() as group:
        with pytest.raises(TooManyRestarts):  # noqa: PT012 - raised as the block is left
            async with supervise(spec) as tree:
                group.start_soon(outside, tree.ref("b"))
                await anyio.wait_all_tasks_blocked()
                await tree.ref("a").ask(kit.die)
    assert outcome == ["actor.stopped"]


async def test_when_the_block_ends_well_mailboxes_are_drained_and_actors_stop_newest_first(kit: Any) -> None:
    diary = Diary()
    gate = anyio.Event()

    def note(line: str) -> Any:
        async def body() -> None:
            await gate.wait()
            diary.lines.append(line)

        return body

    specs = (diary.spec("a"), diary.spec("b", drain=False), diary.spec("c"))
    async with kit.nothing_left(), anyio.create_task_group() as group:
        async with supervise(SupervisorSpec("root", specs)) as tree:
            for name in "abc":
                for i in range(3):
                    await tree.ref(name).tell(note(f"{name}{i}"))
            group.start_soon(open_when_blocked, gate)
    drained = [line for line in diary.lines if line[0] in "-c" or line == "+c"]
    assert drained == ["+c", "c0", "c1", "c2", "-c", "-b", "-a"]
    assert [line for line in diary.lines if line[0] == "a"] == ["a0", "a1", "a2"]


async def open_when_blocked(gate: anyio.Event) -> None:
    await anyio.wait_all_tasks_blocked()
    gate.set()


async def test_an_actor_that_is_not_drained_is_cancelled_at_once(kit: Any) -> None:
    diary = Diary()
    async with supervise(SupervisorSpec("root", (diary.spec("a", drain=False),))) as tree:
        await tree.ref("a").tell(anyio.sleep_forever)
        await anyio.wait_all_tasks_blocked()
    assert diary.lines == ["+a", "-a"]


async def test_a_block_that_fails_or_is_cancelled_does_not_drain_but_stops_all_in_order(kit: Any) -> None:
    for how in ("fails", "is cancelled"):
        diary = Diary()
        specs = tuple(diary.spec(name) for name in "abc")
        with anyio.CancelScope() as scope:
            try:
                async with kit.nothing_left(), supervise(SupervisorSpec("root", specs)) as tree:
                    for name in "abc":
                        await tree.ref(name).tell(anyio.sleep_forever)
                        await tree.ref(name).tell(anyio.sleep_forever)
                    if how == "fails":
                        raise kit.Died
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
            except kit.Died:
                assert how == "fails"
        assert diary.lines == ["+a", "+b", "+c", "-c", "-b", "-a"]


async def test_a_stop_hook_that_hangs_or_fails_is_bounded_and_reported(kit: Any) -> None:
    class Bad(kit.Scripted):  # type: ignore[misc]
        def __init__(self, hangs: bool) -> None:
            self.hangs = hangs

        async def stop(self) -> None:
            if self.hangs:
                await anyio.sleep_forever()
            raise kit.Died

    diary = Diary()
    hangs = kit.scripted("hangs", factory=lambda: Bad(hangs=True), grace=0.01)
    fails = kit.scripted("fails", factory=lambda: Bad(hangs=False))
    with pytest.raises(CleanupError, match=r"root/fails failed as it stopped: Died") as caught:
        async with kit.nothing_left(), supervise(SupervisorSpec("root", (diary.spec("good"), hangs, fails))):
            pass
    assert caught.value.__notes__ == ["also failed: the actor root/hangs did not stop within 0.01 s and was cancelled"]
    assert diary.lines == ["+good", "-good"]


async def test_the_body_s_own_failure_comes_first_and_unwrapped(kit: Any) -> None:
    with pytest.raises(kit.Died):
        async with supervise(SupervisorSpec("root", (kit.scripted(),))):
            raise kit.Died


async def test_children_come_and_go_while_the_tree_runs(kit: Any) -> None:
    async with kit.nothing_left(), supervise(SupervisorSpec("root")) as tree:
        spec = kit.scripted("a")
        ref = await tree.start(spec)
        assert await ref.ask(kit.pong) == "pong"
        with pytest.raises(ConfigError):
            await tree.start(spec)
        await tree.stop("a")
        with pytest.raises(ActorStopped):
            await ref.ask(kit.pong)
        with pytest.raises(ActorError):
            await tree.stop("a")
        again = await tree.start(spec)
        below = await tree.start(SupervisorSpec("below", (kit.scripted("x"),)))
        assert await again.ask(kit.pong) == await below.ref("x").ask(kit.pong) == "pong"
        assert [s.path for s in tree.statistics()] == ["root/a", "root/below/x"]
        with pytest.raises(ActorError):
            tree.ref("below/y")
        await tree.stop("below")
        with pytest.raises(ActorStopped):
            await below.start(spec)
    with pytest.raises(ActorStopped):
        await tree.start(spec)


async def test_a_start_that_is_cancelled_leaves_no_child(kit: Any) -> None:
    class Slow(kit.Scripted):  # type: ignore[misc]
        async def start(self) -> None:
            await anyio.sleep_forever()

    async with kit.nothing_left(), supervise(SupervisorSpec("root")) as tree:
        async with anyio.create_task_group() as group:
            group.start_soon(tree.start, kit.scripted(factory=Slow))
            await anyio.wait_all_tasks_blocked()
            assert [s.state for s in tree.statistics()] == ["starting"]
            group.cancel_scope.cancel()
        assert tree.statistics() == ()


async def test_an_actor_whose_start_fails_is_tried_again_until_its_supervisor_gives_up(kit: Any) -> None:
    tries = []

    class Unborn(kit.Scripted):  # type: ignore[misc]
        async def start(self) -> None:
            tries.append("start")
            raise kit.Died

        async def stop(self) -> None:
            tries.append("stop")

    spec = SupervisorSpec("root", (kit.scripted(factory=Unborn),), restarts=Restarts(most=2, initial=0))
    with pytest.raises(TooManyRestarts):
        async with kit.nothing_left(), supervise(spec):
            raise AssertionError("the block begins only when all have started")
    assert tries == ["start", "stop"] * 3


async def test_waiting_names_who_waits_for_whom_and_since_when(kit: Any) -> None:
    specs = tuple(kit.scripted(name, capacity=1, drain=False) for name in ("idle", "env", "learner"))
    async with supervise(SupervisorSpec("root", specs)) as tree, anyio.create_task_group() as group:

        async def ask_env() -> None:
            await tree.ref("env").ask(anyio.sleep_forever)

        before = anyio.current_time()
        group.start_soon(tree.ref("learner").ask, ask_env)
        await anyio.wait_all_tasks_blocked()
        await tree.ref("env").tell(kit.pong)
        group.start_soon(tree.ref("env").ask, kit.pong)
        await anyio.wait_all_tasks_blocked()
        edges, rows = tree.waiting(), tree.statistics()
        group.cancel_scope.cancel()
    assert all(edge.since >= before for edge in edges if edge.cause in ("reply", "room", "handler"))
    assert [(e.who, e.cause, e.whom) for e in edges] == [
        ("root/idle", "message", ""),
        ("root/env", "handler", ""),
        ("root/learner", "reply", "root/env"),
        ("", "room", "root/env"),
        ("root/learner", "handler", ""),
        ("", "reply", "root/learner"),
    ]
    assert [(row.state, row.depth, row.waiting) for row in rows] == [("idle", 0, 0), ("busy", 1, 1), ("busy", 0, 0)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChildSpec("a/b", object),  # type: ignore[arg-type]
        lambda: ChildSpec("", object),  # type: ignore[arg-type]
        lambda: ChildSpec("a", object, capacity=0),  # type: ignore[arg-type]
        lambda: ChildSpec("a", object, grace=-1),  # type: ignore[arg-type]
        lambda: ChildSpec("a", object, quarantine_after=0),  # type: ignore[arg-type]
        lambda: SupervisorSpec("root", (SupervisorSpec("a"), SupervisorSpec("a"))),
        lambda: Restarts(most=-1),
        lambda: Restarts(jitter=2),
        lambda: Restarts(factor=0.5),
        lambda: Restarts(most=10, within=5, initial=1),
    ],
)
def test_specs_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()
