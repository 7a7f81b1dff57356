"""Resources: a task of their own, open until their block ends, closed newest first, whatever happened."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CleanupError, StageFailed, StageTimeout
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow
from crucible_kitchen.workflow.stage import Retry, stage

pytestmark = pytest.mark.anyio
virtual = pytest.mark.parametrize("anyio_backend", [virtual_clock()], ids=["virtual"])


class House:
    """Makes resources and stages that write down what happens."""

    def __init__(self) -> None:
        self.diary: list[str] = []

    def resource(self, name: str, writes: str | None = None) -> Any:
        async def body() -> AsyncIterator[str]:
            self.diary.append(f"open {name}")
            try:
                yield name
            finally:
                await anyio.lowlevel.checkpoint()
                self.diary.append(f"close {name}")

        return stage(name=name, writes=writes or name)(body)

    def step(self, name: str, error: Exception | None = None) -> Any:
        async def body() -> None:
            await anyio.lowlevel.checkpoint()
            self.diary.append(name)
            if error is not None:
                raise error

        return stage(name=name)(body)


@pytest.fixture
def house() -> House:
    return House()


async def test_resources_close_newest_first_when_the_workflow_ends(house: House, run_workflow: Any, log: Any) -> None:
    workflow = Workflow("w", house.resource("a"), house.resource("b"), house.step("work"))
    assert await run_workflow(workflow) == {}
    assert house.diary == ["open a", "open b", "work", "close b", "close a"]
    assert log.lines[-4:] == [
        "stage.start w/b/cleanup",
        "stage.stop w/b/cleanup",
        "stage.start w/a/cleanup",
        "stage.stop w/a/cleanup",
    ]
    assert log.records[-1].event.stage == "cleanup"


async def test_resources_close_when_a_stage_fails(house: House, run_workflow: Any) -> None:
    workflow = Workflow("w", house.resource("a"), house.resource("b"), house.step("work", ValueError("no")))
    with pytest.raises(StageFailed, match="w/work: ValueError"):
        await run_workflow(workflow)
    assert house.diary == ["open a", "open b", "work", "close b", "close a"]


async def test_resources_close_when_a_later_one_does_not_open(house: House, run_workflow: Any) -> None:
    @stage()
    async def broken() -> AsyncIterator[int]:
        raise OSError("no device")
        yield 1

    with pytest.raises(StageFailed, match="w/broken: OSError: no device"):
        await run_workflow(Workflow("w", house.resource("a"), broken))
    assert house.diary == ["open a", "close a"]


async def test_a_turn_closes_what_it_opened(house: House, run_workflow: Any) -> None:
    await run_workflow(Workflow("w", Loop("i", lambda: range(2), house.resource("a"), house.step("work"))))
    assert house.diary == ["open a", "work", "close a"] * 2


async def test_what_a_when_opens_belongs_to_the_block_around_it(house: House, run_workflow: Any) -> None:
    inner = When(lambda: True, house.resource("a"), house.step("inside"))
    await run_workflow(Workflow("w", Loop("i", lambda: range(1), inner, house.step("after")), house.step("end")))
    assert house.diary == ["open a", "inside", "after", "close a", "end"]


async def test_a_branch_closes_what_it_opened_before_the_join(house: House, run_workflow: Any) -> None:
    seen = []

    @stage()
    async def after(a: str = "gone") -> None:
        seen.append((a, list(house.diary)))

    one, two = house.resource("one", writes="env"), house.resource("two", writes="env")
    await run_workflow(Workflow("w", Parallel([one, house.step("x")], [two, house.step("y")]), after))
    assert {"close one", "close two"} <= set(seen[0][1])
    assert seen[0][0] == "gone"


async def test_a_nested_workflow_closes_what_it_opened(house: House, run_workflow: Any) -> None:
    inner = Workflow("inner", house.resource("a"), house.step("work"))
    await run_workflow(Workflow("w", inner, house.step("after")))
    assert house.diary == ["open a", "work", "close a", "after"]


async def test_a_resource_may_open_a_task_group_around_its_yield(run_workflow: Any) -> None:
    beats = []

    @stage(writes="heart", timeout=5)
    async def heartbeat() -> AsyncIterator[str]:
        async def beat() -> None:
            while True:
                beats.append(1)
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(beat)
            with anyio.CancelScope():
                yield "alive"
            group.cancel_scope.cancel()

    @stage(timeout=5)
    async def wait_for_beats(heart: str) -> None:
        while len(beats) < 3:
            await anyio.lowlevel.checkpoint()

    await run_workflow(Workflow("w", Loop("i", lambda: range(2), heartbeat, wait_for_beats)))
    assert len(beats) >= 3


async def test_a_resource_that_dies_early_fails_its_block_with_its_error(
    house: House, run_workflow: Any, log: Any
) -> None:
    died = anyio.Event()

    @stage(writes="pool")
    async def pool() -> AsyncIterator[str]:
        async def worker() -> None:
            await anyio.lowlevel.checkpoint()
            died.set()
            raise OSError("worker lost")

        async with anyio.create_task_group() as group:
            group.start_soon(worker)
            yield "pool"

    @stage()
    async def forever() -> None:
        await anyio.sleep_forever()

    with pytest.raises(StageFailed, match="w/pool: OSError: worker lost") as caught:
        await run_workflow(Workflow("w", house.resource("a"), pool, forever))
    assert isinstance(caught.value.__cause__, OSError)
    assert house.diary == ["open a", "close a"]
    assert "stage.error w/pool stage.failed halt" in log.lines
    assert "stage.start w/pool/cleanup" not in log.lines


async def test_a_death_comes_before_what_the_stage_raises_because_of_it(run_workflow: Any) -> None:
    scope = anyio.CancelScope()

    @stage(writes="pool")
    async def pool() -> AsyncIterator[str]:
        with scope:
            yield "pool"

    @stage()
    async def reacts() -> None:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("connection lost")

    with pytest.raises(StageFailed, match="w/pool: ended before its block did") as caught:
        await run_workflow(Workflow("w", pool, reacts))
    assert any("connection lost" in note for note in caught.value.__notes__)


async def test_a_resource_that_dies_while_a_newer_one_closes_is_reported(house: House, run_workflow: Any) -> None:
    stop, lost = anyio.Event(), anyio.Event()

    @stage(writes="old")
    async def old() -> AsyncIterator[str]:
        async def worker() -> None:
            await stop.wait()
            raise OSError("too early")

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(worker)
                yield "old"
        finally:
            lost.set()

    @stage(writes="new")
    async def new() -> AsyncIterator[str]:
        yield "new"
        stop.set()
        await lost.wait()

    with pytest.raises(StageFailed, match="w/old: OSError: too early"):
        await run_workflow(Workflow("w", old, new))


@virtual
async def test_a_slow_close_is_cancelled_after_the_grace(house: House, run_workflow: Any) -> None:
    began = []

    @stage(writes="slow")
    async def slow() -> AsyncIterator[str]:
        yield "slow"
        began.append(anyio.current_time())
        try:
            await anyio.sleep(1000)
        finally:
            began.append(anyio.current_time())

    with pytest.raises(CleanupError, match=r"w/slow: did not close within 30 s and was cancelled"):
        await run_workflow(Workflow("w", house.resource("a"), slow))
    assert began[1] - began[0] == pytest.approx(30)
    assert house.diary == ["open a", "close a"]


@virtual
async def test_a_close_within_the_grace_is_left_in_peace(run_workflow: Any) -> None:
    @stage(writes="slow")
    async def slow() -> AsyncIterator[str]:
        yield "slow"
        await anyio.sleep(9.9)

    await run_workflow(Workflow("w", slow), RunConfig(grace=10))


@virtual
async def test_a_close_that_swallows_its_cancellation_once_does_not_escape_it(run_workflow: Any) -> None:
    swallowed = []

    @stage(writes="stubborn")
    async def stubborn() -> AsyncIterator[str]:
        yield "x"
        try:
            await anyio.sleep_forever()
        except BaseException:
            swallowed.append(1)
        await anyio.sleep_forever()

    with pytest.raises(CleanupError, match="was cancelled"):
        await run_workflow(Workflow("w", stubborn))
    assert swallowed == [1]


@virtual
async def test_a_close_that_shields_itself_is_reported_and_still_waited_for(run_workflow: Any, log: Any) -> None:
    @stage(writes="stubborn")
    async def stubborn() -> AsyncIterator[str]:
        yield "x"
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1000)

    began = anyio.current_time()
    with pytest.raises(CleanupError, match="ignores its cancellation"):
        await run_workflow(Workflow("w", stubborn))
    assert anyio.current_time() - began == pytest.approx(1000)
    (error,) = [record.event for record in log.records if record.event.name == "stage.error"]
    assert error.duration_s == pytest.approx(60)
    assert log.records[-1].event.name == "run.stalled"


@virtual
async def test_opening_has_a_timeout_and_the_opened_time_has_none(run_workflow: Any) -> None:
    @stage(writes="slow", timeout=3)
    async def slow() -> AsyncIterator[str]:
        await anyio.sleep(4)
        yield "slow"

    @stage(writes="quick", timeout=3)
    async def quick() -> AsyncIterator[str]:
        yield "quick"

    @stage()
    async def long() -> None:
        await anyio.sleep(100)

    await run_workflow(Workflow("w", quick, long))
    began = anyio.current_time()
    with pytest.raises(StageTimeout, match="w/slow: did not open within 3 s"):
        await run_workflow(Workflow("w", slow))
    assert anyio.current_time() - began == pytest.approx(3)


@virtual
async def test_a_late_opening_is_tried_again_and_does_not_kill_the_block(house: House, run_workflow: Any) -> None:
    tries = []

    @stage(writes="slow", timeout=3, retry=Retry(attempts=2, on=(StageTimeout,)))
    async def slow() -> AsyncIterator[str]:
        tries.append(1)
        try:
            await anyio.sleep(4 if len(tries) == 1 else 1)
        except BaseException:
            house.diary.append("swallowed")
        yield "slow"
        house.diary.append("close slow")

    await run_workflow(Workflow("w", slow, house.step("work")))
    assert house.diary == ["swallowed", "work", "close slow"]


async def test_a_resource_yields_once_neither_never_nor_twice(house: House, run_workflow: Any) -> None:
    @stage(writes="never")
    async def never() -> AsyncIterator[str]:
        if house.diary:
            yield "x"

    @stage(writes="twice")
    async def twice() -> AsyncIterator[str]:
        try:
            yield "x"
            yield "y"
        finally:
            house.diary.append("closed")

    with pytest.raises(StageFailed, match="w/never: is a resource but did not yield"):
        await run_workflow(Workflow("w", never))
    with pytest.raises(CleanupError, match="w/twice: failed to close: StageFailed: is a resource but yielded twice"):
        await run_workflow(Workflow("w", twice))
    assert house.diary == ["closed"]


async def test_a_close_that_fails_fails_the_run_and_the_others_are_closed(house: House, run_workflow: Any) -> None:
    @stage(writes="bad")
    async def bad() -> AsyncIterator[str]:
        yield "x"
        raise OSError("disk full")

    workflow = Workflow("w", house.resource("a"), bad, house.resource("b"))
    with pytest.raises(CleanupError, match="w/bad: failed to close: OSError: disk full") as caught:
        await run_workflow(workflow)
    assert isinstance(caught.value.__cause__, OSError)
    assert house.diary == ["open a", "open b", "close b", "close a"]


async def test_resources_close_even_when_the_log_cannot_be_written(house: House, run_workflow: Any, log: Any) -> None:
    workflow = Workflow("w", house.resource("a"), house.resource("b"), house.step("work"))
    emit = log.emit

    def full(event: Any) -> Any:
        if getattr(event, "stage", "") in ("work", "cleanup"):
            raise OSError("no space left")
        return emit(event)

    log.emit = full
    with pytest.raises(Exception, match="no space left"):
        await run_workflow(workflow)
    assert house.diary == ["open a", "open b", "close b", "close a"]


async def test_a_resource_with_skip_that_does_not_open_writes_nothing(run_workflow: Any) -> None:
    seen = []

    @stage(writes="extra", on_error="skip")
    async def extra() -> AsyncIterator[str]:
        raise OSError("none")
        yield "x"

    @stage()
    async def look(extra: str = "none") -> None:
        seen.append(extra)

    await run_workflow(Workflow("w", extra, look))
    assert seen == ["none"]


async def test_inside_a_rollback_sessions_block_stages_do_not_wait_for_their_records(
    run_workflow: Any, log: Any
) -> None:
    from crucible_kitchen.ports import TrainingCapabilities

    class Session:
        position = 0
        capabilities = TrainingCapabilities("exact", frozenset(), "honoured", "rollback")

    @stage(writes="session")
    async def session() -> AsyncIterator[Session]:
        yield Session()

    @stage()
    async def work() -> None: ...

    turn = Loop("i", lambda: range(2), session, work, work.with_(name="again"))
    await run_workflow(Workflow("w", work, turn, work.with_(name="after")))
    assert log.syncs == 2
