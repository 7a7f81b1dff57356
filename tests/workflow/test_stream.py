"""Streams: production beside the body, what each sees, how failures and cancellation end both."""

from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from crucible_kitchen.errors import StageFailed, WorkflowError
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.describe import mermaid, text
from crucible_kitchen.workflow.nodes import Loop, Stream, Workflow
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

pytestmark = pytest.mark.anyio


class Pairs:
    """A feed: has so many numbers produced, all at a time, and gives them out two by two."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.count, self.broken, self.at = count, broken, 0
        self.open = False

    @asynccontextmanager
    async def running(self, produce: Any, *, warn: Any) -> Any:
        self.send, self.receive = anyio.create_memory_object_stream[Any](2)

        async def one(number: int) -> None:
            await self.send.send(await produce(number))

        async with anyio.create_task_group() as group:
            for number in range(self.count):
                group.start_soon(one, number)
            self.open = True
            try:
                yield self
            finally:
                self.open = False
                self.send.close()
                self.receive.close()
                group.cancel_scope.cancel()

    def __aiter__(self) -> "Pairs":
        return self

    async def __anext__(self) -> list[Any]:
        if self.at == self.broken:
            raise ValueError("the feed broke")
        if 2 * self.at >= self.count:
            raise StopAsyncIteration
        self.at += 1
        return [await self.receive.receive(), await self.receive.receive()]

    def position(self) -> int:
        return self.at

    def seek(self, position: int) -> None:
        self.at = position


@stage(writes="seen")
async def begin() -> int:
    return 100


@stage()
async def produce(draw: int, seen: int) -> int:
    await anyio.sleep(0.01 * (draw % 3))
    return draw + seen


@stage(writes="seen")
async def consume(pairs: list[int], run: Run, seen: int) -> int:
    assert run.path == f"w/pairs[{run.turn('pairs')}]/consume"
    return seen + sum(pairs)


def stream(*body: Any, feed: Any = None, **options: Any) -> Workflow:
    feed = feed or Pairs(6)

    def over() -> Pairs:
        return feed

    nodes = options.pop("produce", produce), *(body or (consume,))
    return Workflow("w", begin, Stream("pairs", *nodes, over=over, **options))


async def test_the_body_writes_state_and_production_sees_it_as_it_was_when_the_stream_began(run_workflow, log):
    state = await run_workflow(stream())
    assert state == {"seen": 100 + sum(100 + i for i in range(6))}
    assert [line for line in log.lines if "consume" in line][::2] == [
        f"stage.start w/pairs[{i}]/consume" for i in range(3)
    ]


async def test_a_body_that_fails_ends_production_and_is_the_failure(run_workflow):
    feed = Pairs(6)

    @stage()
    async def fail(pairs: list[int]) -> None:
        raise ValueError("no")

    with pytest.raises(StageFailed) as caught:
        await run_workflow(stream(fail, feed=feed))
    assert caught.value.where == "w/pairs[0]/fail"
    assert not feed.open


async def test_a_feed_that_fails_is_a_failure_with_the_stream_s_path(run_workflow):
    with pytest.raises(StageFailed) as caught:
        await run_workflow(stream(feed=Pairs(6, broken=1)))
    assert caught.value.where == "w/pairs"


async def test_cancelling_ends_both(run_workflow):
    feed = Pairs(6)

    @stage()
    async def wait(pairs: list[int]) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.1):
        await run_workflow(stream(wait, feed=feed))
    assert feed.at == 1
    assert not feed.open


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: stream(produce=begin), "is a stage that writes nothing"),
        (lambda: stream(draws="seen"), "the draw's name 'seen' is already taken"),
        (lambda: stream(draws="other"), "reads 'draw', which no stage before it writes"),
        (lambda: Workflow("w", begin, Stream("seen", produce, over=lambda: Pairs(2))), "'seen' is already taken"),
        (lambda: Workflow("w", Stream("pairs", produce, over=lambda: Pairs(2))), "reads 'seen'"),
    ],
)
def test_what_is_wrong_with_a_stream_is_told_before_it_runs(build, says):
    with pytest.raises(WorkflowError, match=says):
        check(build())


def test_a_stream_over_what_is_no_feed_is_told():
    def over() -> dict[str, int]:
        return {}

    def plain() -> Run:
        raise NotImplementedError

    with pytest.raises(WorkflowError, match="no feed"):
        check(Workflow("w", begin, Stream("pairs", produce, over=plain)))
    check(Workflow("w", begin, Stream("pairs", produce, over=over)))  # generic types are not judged


def test_streams_are_edited_described_and_drawn():
    workflow = stream(Loop("again", lambda: range(2), consume))

    @stage()
    async def other(draw: int) -> int:
        return draw

    changed = workflow.replace("produce", other)
    assert "for each draw: other(draw)" in text(changed)
    assert "for each draw: produce(draw, seen)" in text(workflow)
    assert "stream pairs from over" in mermaid(workflow)
    assert "consume" not in text(workflow.without("pairs/again/consume"))
    with pytest.raises(LookupError, match="produced by one stage"):
        workflow.without("produce")
