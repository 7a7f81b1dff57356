"""Loops: their turns, their items, how they end."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from crucible_kitchen.errors import StageFailed
from crucible_kitchen.workflow.nodes import Loop, Positioned, Workflow
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

pytestmark = pytest.mark.anyio


class Stream:
    """A data stream that knows its place."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.at = 0
        self.closed = 0

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while self.at < len(self.items):
                await anyio.lowlevel.checkpoint()
                self.at += 1
                if isinstance(self.items[self.at - 1], Exception):
                    raise self.items[self.at - 1]
                yield self.items[self.at - 1]
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.closed += 1

    def position(self) -> int:
        return self.at

    def seek(self, position: int) -> None:
        self.at = position


def recorder() -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    @stage()
    async def see(item: Any, run: Run) -> None:
        seen.append((item, run.turn("item")))

    return see, seen


@pytest.mark.parametrize("items", [[], (), range(0), ""])
async def test_no_items_no_turns(items: Any, run_workflow: Any, log: Any) -> None:
    see, seen = recorder()
    assert await run_workflow(Workflow("w", Loop("item", lambda: items, see))) == {}
    assert (seen, log.records) == ([], [])


async def test_a_positioned_stream_is_iterated_and_closed(run_workflow: Any) -> None:
    see, seen = recorder()
    stream = Stream(["a", "b"])
    assert isinstance(stream, Positioned)
    await run_workflow(Workflow("w", Loop("item", lambda: stream, see)))
    assert seen == [("a", 0), ("b", 1)]
    assert stream.closed == 1


async def test_a_stream_is_closed_when_the_body_fails_or_until_ends_the_loop(run_workflow: Any) -> None:
    @stage()
    async def fail(item: Any) -> None:
        raise ValueError(item)

    stream = Stream(["a", "b"])
    with pytest.raises(StageFailed):
        await run_workflow(Workflow("w", Loop("item", lambda: stream, fail)))
    assert stream.closed == 1
    see, seen = recorder()
    stream = Stream(["a", "b"])
    await run_workflow(Workflow("w", Loop("item", lambda: stream, see, until=lambda: True)))
    assert (stream.closed, len(seen)) == (1, 1)


async def test_a_stream_that_fails_is_reported_with_the_loop(run_workflow: Any) -> None:
    see, _ = recorder()
    with pytest.raises(StageFailed, match="w/item: OSError") as caught:
        await run_workflow(Workflow("w", Loop("item", lambda: Stream(["a", OSError("gone")]), see)))
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_sequence_that_fails_is_reported_with_the_loop(run_workflow: Any) -> None:
    class Rows(list[int]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("gone")

    see, _ = recorder()
    with pytest.raises(StageFailed, match="w/item: OSError: gone"):
        await run_workflow(Workflow("w", Loop("item", lambda: Rows([1]), see)))


@pytest.mark.parametrize("items", [iter([1]), {"a": 1}, 3, {1, 2}])
async def test_what_has_no_position_is_refused(items: Any, run_workflow: Any) -> None:
    see, _ = recorder()
    with pytest.raises(StageFailed, match=r"w/item: cannot loop over a \w+") as caught:
        await run_workflow(Workflow("w", Loop("item", lambda: items, see)))
    assert caught.value.hint == "give a Sequence, a range or a Positioned"


async def test_until_is_asked_at_the_end_of_each_turn(run_workflow: Any) -> None:
    @stage(writes="last")
    async def keep(item: int) -> int:
        return item

    loop = Loop("item", lambda: range(10), keep, until=lambda item, last: item == last == 2)
    assert await run_workflow(Workflow("w", loop)) == {"last": 2}


async def test_nested_loops_have_their_own_names_turns_and_paths(run_workflow: Any) -> None:
    seen = []

    @stage()
    async def see(a: int, b: int, run: Run) -> None:
        seen.append((a, b, run.turn("a"), run.turn("b"), run.path))

    await run_workflow(Workflow("w", Loop("a", lambda: [3, 4], Loop("b", lambda a: range(a - 2), see))))
    assert seen == [
        (3, 0, 0, 0, "w/a[0]/b[0]/see"),
        (4, 0, 1, 0, "w/a[1]/b[0]/see"),
        (4, 1, 1, 1, "w/a[1]/b[1]/see"),
    ]


async def test_a_loop_of_stages_that_never_wait_lets_others_run(run_workflow: Any) -> None:
    turns, others = [], []

    @stage()
    async def busy(item: int) -> None:
        turns.append(item)

    async def other() -> None:
        while len(turns) < 20:
            others.append(len(turns))
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        await run_workflow(Workflow("w", Loop("item", lambda: range(20), busy)))
    assert len(others) >= 10
