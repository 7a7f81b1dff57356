"""A stall names its culprit: who waits for whom, since when; and nothing is called a stall while anything moves."""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_kitchen.actors import Actor, ChildSpec, SupervisorSpec, supervise
from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import RunStalled
from crucible_kitchen.loop import EventLoop
from crucible_kitchen.store import MemoryRunStore, RunRecord
from crucible_kitchen.telemetry import EventLog
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.waits import Waiting, Waits, culprit, current_waits, waiting
from crucible_kitchen.workers import Lane, Submissions, run_sync
from crucible_kitchen.workflow.nodes import Loop, Parallel, Workflow
from crucible_kitchen.workflow.run import RunContext
from crucible_kitchen.workflow.stage import stage
from crucible_kitchen.workflow.watchdog import watched

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    return virtual_clock()


AFTER = 600.0


def config(policy: str = "abort", **values: Any) -> RunConfig:
    return RunConfig.model_validate({"on_stall": policy, "stall_after": AFTER, "stage_timeout": None, **values})


# -- seven stalls -------------------------------------------------------------------------------------------------


@stage()
async def sleeps() -> None:
    await anyio.sleep_forever()


class Forward:
    async def never(self) -> None:
        await anyio.sleep_forever()

    async def submit(self, calls: Submissions) -> Any:
        return calls.submit(self.never)


@stage()
async def asks_a_backend() -> None:
    async with Submissions() as calls:
        await (await Forward().submit(calls))


class Handler(Actor[Callable[[], Awaitable[Any]], Any]):
    async def handle(self, message: Callable[[], Awaitable[Any]]) -> Any:
        return await message()


LEFT, RIGHT = ChildSpec("left", Handler), ChildSpec("right", Handler)
POOL = SupervisorSpec("pool", (LEFT, RIGHT))


@stage()
async def asks_an_actor() -> None:
    async with supervise(POOL) as tree:
        await tree.ref(LEFT).ask(anyio.sleep_forever)


@stage()
async def asks_in_a_circle() -> None:
    async with supervise(POOL) as tree:
        left, right = tree.ref(LEFT), tree.ref(RIGHT)
        await left.ask(lambda: right.ask(lambda: left.ask(anyio.sleep_forever)))


@stage()
async def fills_a_queue() -> None:
    put, get = anyio.create_memory_object_stream[int](1)
    with put, get:
        for item in range(2):
            with waiting("room", "rollouts"):
                await put.send(item)


class Dry:
    def __aiter__(self) -> "Dry":
        return self

    async def __anext__(self) -> int:
        await anyio.sleep_forever()
        raise StopAsyncIteration

    def position(self) -> int:
        return 0

    def seek(self, position: Any) -> None:
        raise NotImplementedError


@stage()
async def nothing() -> None:
    await anyio.lowlevel.checkpoint()


@stage(writes="door")
async def door() -> AsyncIterator[int]:
    await anyio.sleep_forever()
    yield 1


STALLS = {
    "a stage's own code": (Workflow("w", sleeps), "w/sleeps is in its own code", ":sleeps:"),
    "a pending backend call": (
        Workflow("w", asks_a_backend),
        "w/asks_a_backend waits for the call Forward.never",
        ":Forward.never:",
    ),
    "an actor's handler": (Workflow("w", asks_an_actor), "pool/left handles a message", ":Handler.handle:"),
    "actors in a circle": (
        Workflow("w", asks_in_a_circle),
        "a circle: pool/left waits for the reply of pool/right since 750 s, "
        "pool/right waits for the reply of pool/left since 750 s",
        "",
    ),
    "a full queue": (
        Workflow("w", fills_a_queue),
        "w/fills_a_queue waits for room in rollouts",
        ":fills_a_queue:",
    ),
    "a loop's next item": (
        Workflow("w", Loop("item", Dry, nothing)),
        "waits for the next item of w/item",
        ":Dry.__anext__:",
    ),
    "a resource that does not open": (Workflow("w", door), "w/door is being opened", ":door:"),
}


@pytest.mark.parametrize("kind", STALLS)
async def test_a_stall_is_told_by_its_culprit_and_ends_the_run_in_time(kind: str, run_workflow: Any, log: Any) -> None:
    workflow, says, stands = STALLS[kind]
    began = anyio.current_time()
    with pytest.raises(RunStalled) as raised:
        await run_workflow(workflow, config())
    assert AFTER <= anyio.current_time() - began <= 2 * AFTER
    (told,) = [record.event for record in log.records if record.event.name == "run.stalled"]
    assert says in told.culprit
    assert told.culprit in raised.value.message
    assert stands in told.culprit
    assert told.policy == "abort"
    assert all(wait["for_s"] >= AFTER for wait in told.waits)


async def test_records_that_do_not_reach_the_disk_are_a_stall_too(run_workflow: Any, tmp_path: Any) -> None:
    class Stuck(MemoryRunStore):
        async def flush(self, run_id: str, seq: int) -> None:
            await anyio.sleep_forever()

    async with Stuck() as store:
        await store.create_run(RunRecord("r", "w"))
        context = RunContext("r", "w", 0, tmp_path, EventLog("r", store))
        with pytest.raises(RunStalled, match="waits for r to be on disk"):
            await watched(context.recorder.sync, config(), context)


async def test_all_who_wait_are_listed_with_since_when(run_workflow: Any, log: Any) -> None:
    @stage()
    async def late() -> None:
        await anyio.sleep(100)

    with pytest.raises(RunStalled):
        await run_workflow(Workflow("w", Parallel(sleeps, [late, fills_a_queue])), config())
    (told,) = [record.event for record in log.records if record.event.name == "run.stalled"]
    waits = {wait["who"]: wait for wait in told.waits}
    assert waits["w/sleeps"]["cause"] == "stage"
    assert waits["w/fills_a_queue"]["whom"] == "rollouts"
    assert waits["w/sleeps"]["for_s"] == pytest.approx(waits["w/fills_a_queue"]["for_s"] + 100)
    assert "w/late" not in waits


# -- what is done about it ----------------------------------------------------------------------------------------


async def test_a_stall_that_only_warns_is_told_once_until_something_moves_again(run_workflow: Any, log: Any) -> None:
    @stage()
    async def slow() -> None:
        await anyio.sleep(5 * AFTER)

    await run_workflow(Workflow("w", slow, slow.with_(name="slow_again")), config("warn"))
    told = [record.event.culprit for record in log.records if record.event.name == "run.stalled"]
    assert [text.partition(" ")[0] for text in told] == ["w/slow", "w/slow_again"]


async def test_zero_never_tells_a_stall(run_workflow: Any, log: Any) -> None:
    @stage()
    async def slow() -> None:
        await anyio.sleep(80_000)

    await run_workflow(Workflow("w", slow), config(stall_after=0))
    assert not [line for line in log.lines if line.startswith("run.stalled")]


async def test_a_run_that_is_ended_for_a_stall_still_closes_its_resources(run_workflow: Any) -> None:
    closed = []

    @stage(writes="held")
    async def held() -> AsyncIterator[int]:
        yield 1
        closed.append(1)

    with pytest.raises(RunStalled):
        await run_workflow(Workflow("w", held, sleeps), config())
    assert closed == [1]


async def test_a_log_that_cannot_take_the_stall_ends_the_run(run_workflow: Any, log: Any) -> None:
    keep = log.emit

    def full(event: Any) -> Any:
        if event.name == "run.stalled":
            raise OSError("full")
        return keep(event)

    log.emit = full
    with pytest.raises(OSError, match="full"):
        await run_workflow(Workflow("w", sleeps), config("warn"))


# -- no false alarm -----------------------------------------------------------------------------------------------


async def a_call() -> None:
    async with Submissions() as calls:
        await calls.submit(lambda: anyio.sleep(AFTER * 0.9))


async def an_actor() -> None:
    async with supervise(POOL) as tree:
        await tree.ref(LEFT).ask(lambda: anyio.sleep(AFTER * 0.9))


async def a_queue() -> None:
    with waiting("item", "rollouts"):
        await anyio.sleep(AFTER * 0.9)


@pytest.mark.parametrize("move", [a_call, an_actor, a_queue])
async def test_while_anything_moves_nothing_is_called_a_stall(move: Any, run_workflow: Any, log: Any) -> None:
    @stage()
    async def stuck() -> None:
        await anyio.sleep(8 * AFTER)

    @stage()
    async def moves() -> None:
        for _ in range(10):
            await move()

    await run_workflow(Workflow("w", Parallel(stuck, moves)), config())
    assert not [line for line in log.lines if line.startswith("run.stalled")]


class Silent:
    def __init__(self) -> None:
        self.told: list[float] = []

    def emit(self, event: Any) -> Any:
        if event.name == "run.stalled":
            self.told.append(anyio.current_time())


@settings(max_examples=60, deadline=None)
@given(pauses=st.lists(st.floats(min_value=0.1, max_value=4 * AFTER), max_size=8))
async def test_it_is_told_for_every_pause_that_is_long_enough_and_for_no_other(pauses: list[float]) -> None:
    silent = Silent()
    context = RunContext("r", "w", 0, Any, silent)  # type: ignore[arg-type]
    long: list[tuple[float, float]] = []

    async def work() -> None:
        for pause in pauses:
            begin = anyio.current_time()
            with waiting("item", "q"):
                await anyio.sleep(pause)
            long.append((begin, pause))

    await watched(work, config("warn"), context)
    must = [begin for begin, pause in long if pause > 1.25 * AFTER + 1e-6]
    may = [begin for begin, pause in long if pause >= AFTER]
    assert len(must) <= len(silent.told) <= len(may)
    for begin in must:
        assert [at for at in silent.told if begin + AFTER <= at <= begin + 1.25 * AFTER + 1e-6]


# -- the graph ----------------------------------------------------------------------------------------------------


def edge(who: str, whom: str = "", since: float = 0.0, cause: Any = "reply") -> Waiting:
    return Waiting(who, cause, whom, since)


async def test_what_most_wait_for_is_the_culprit_and_the_oldest_where_they_are_equal() -> None:
    many = [edge("a", "m"), edge("b", "m"), edge("m", since=5, cause="handler"), edge("x", since=1, cause="stage")]
    assert culprit(many) == [many[2]]
    equal = [edge("a", since=2, cause="stage"), edge("b", since=1, cause="stage")]
    assert culprit(equal) == [equal[1]]
    assert culprit([]) == []


async def test_a_circle_is_told_without_what_leads_to_it() -> None:
    edges = [edge("stage", "a"), edge("a", "b"), edge("b", "c"), edge("c", "b")]
    assert culprit(edges) == [edges[2], edges[3]]


async def test_outside_a_run_waiting_does_nothing() -> None:
    assert current_waits.get() is None
    with waiting("item", "q"):
        await anyio.lowlevel.checkpoint()


async def test_what_a_source_moved_still_counts_when_it_is_gone() -> None:
    class Moved:
        moves = 7

        def waiting(self) -> list[Waiting]:
            return [edge("a", "b")]

    waits = Waits(EventLoop())
    before = waits.moves
    with waits.with_source(Moved()):
        assert waits.snapshot() == [edge("a", "b")]
        during = waits.moves
    assert before < during < waits.moves
    assert waits.snapshot() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("way", ["lane", "worker"])
async def test_a_function_that_hangs_in_a_thread_is_named(way: str, run_workflow: Any, log: Any) -> None:
    released = threading.Event()
    keep = log.emit

    def release(event: Any) -> Any:
        if event.name == "run.stalled":
            released.set()
        return keep(event)

    log.emit = release

    @stage()
    async def computes() -> None:
        async with Lane("torch") as lane:
            await (lane.run(released.wait) if way == "lane" else run_sync(released.wait))

    await run_workflow(Workflow("w", computes), config("warn", stall_after=0.02))
    (told,) = [record.event for record in log.records if record.event.name == "run.stalled"]
    what = "torch: Event.wait" if way == "lane" else "Event.wait"
    assert told.culprit.startswith(f"w/computes waits for {what} in a thread since")
