"""Parallel: really concurrent branches, their limit, and what happens when some of them fail."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import StageFailed
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.workflow.nodes import Loop, Parallel, Workflow
from crucible_kitchen.workflow.stage import stage

pytestmark = pytest.mark.anyio
virtual = pytest.mark.parametrize("anyio_backend", [virtual_clock()], ids=["virtual"])


def failing(name: str, after: float = 0.0, cleanup: Exception | None = None, closing: float = 0.0) -> list[Any]:
    """A branch: a resource that closes in ``closing`` seconds, perhaps badly, and a stage that fails."""

    async def opened() -> AsyncIterator[str]:
        yield name
        await anyio.sleep(closing)
        if cleanup:
            raise cleanup

    async def body() -> None:
        await anyio.sleep(after)
        raise ValueError(name)

    return [stage(name=f"open_{name}", writes=f"r_{name}")(opened), stage(name=name)(body)]


async def test_branches_interleave(run_workflow: Any) -> None:
    left, right = anyio.Event(), anyio.Event()

    @stage(writes="a", timeout=5)
    async def ping() -> int:
        left.set()
        await right.wait()
        return 1

    @stage(writes="b", timeout=5)
    async def pong() -> int:
        await left.wait()
        right.set()
        return 2

    assert await run_workflow(Workflow("w", Parallel(ping, pong))) == {"a": 1, "b": 2}


@pytest.mark.parametrize("limit", [1, 2, 5, None])
async def test_the_limit_bounds_how_many_branches_run_at_a_time(limit: int | None, run_workflow: Any) -> None:
    running, most = 0, 0

    def branch(index: int) -> Any:
        async def body() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            running -= 1

        return stage(name=f"b{index}")(body)

    await run_workflow(Workflow("w", Parallel(*[branch(i) for i in range(5)], limit=limit)))
    assert most == (limit or 5)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Parallel(limit=0)


async def test_no_branches_is_nothing(run_workflow: Any) -> None:
    assert await run_workflow(Workflow("w", Parallel())) == {}


async def test_halt_cancels_the_siblings_and_raises_the_failure(run_workflow: Any) -> None:
    cancelled = []

    @stage()
    async def forever() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(1)

    with pytest.raises(StageFailed, match="w/x: ValueError") as caught:
        await run_workflow(Workflow("w", Parallel(forever, failing("x"))))
    assert cancelled == [1]
    assert isinstance(caught.value.__cause__, ValueError)


@virtual
async def test_the_first_failure_in_time_is_raised_though_its_branch_takes_longer_to_close(run_workflow: Any) -> None:
    @stage()
    async def second() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("second")

    branches = Parallel(second, failing("first", after=1, closing=20))
    began = anyio.current_time()
    with pytest.raises(StageFailed, match="w/first: ValueError") as caught:
        await run_workflow(Workflow("w", branches))
    assert anyio.current_time() - began == pytest.approx(21)
    assert any("OSError" in note for note in caught.value.__notes__)


@virtual
async def test_siblings_are_cancelled_at_the_failure_not_after_its_clean_up(run_workflow: Any) -> None:
    ended = []

    @stage()
    async def sibling() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(anyio.current_time())

    began = anyio.current_time()
    with pytest.raises(StageFailed):
        await run_workflow(Workflow("w", Parallel(sibling, failing("x", after=1, closing=20))))
    assert ended[0] - began == pytest.approx(1)


@virtual
async def test_a_failure_in_a_nested_parallel_halts_the_outer_one_at_once(run_workflow: Any) -> None:
    ended = []

    @stage()
    async def sibling() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(anyio.current_time())

    began = anyio.current_time()
    inner = Parallel(failing("x", after=1, closing=20), failing("y", after=2))
    with pytest.raises(StageFailed, match="w/x: "):
        await run_workflow(Workflow("w", Parallel(sibling, [inner])))
    assert ended[0] - began == pytest.approx(1)


async def test_what_fails_while_siblings_close_is_noted(run_workflow: Any) -> None:
    async def opened() -> AsyncIterator[str]:
        yield "x"
        raise OSError("bad close")

    @stage()
    async def forever() -> None:
        await anyio.sleep_forever()

    resource = stage(name="opened", writes="o")(opened)
    with pytest.raises(StageFailed, match="w/x: ValueError") as caught:
        await run_workflow(Workflow("w", Parallel([resource, forever], failing("x", cleanup=KeyError("own")))))
    notes = "\n".join(caught.value.__notes__)
    assert "bad close" in notes
    assert "KeyError" in notes


async def test_skip_lets_the_others_end_and_goes_on_without_the_failed_branchs_writes(run_workflow: Any) -> None:
    seen = []

    @stage(writes="a")
    async def partly() -> int:
        return 1

    @stage()
    async def fail() -> None:
        raise ValueError("x")

    @stage(writes="b")
    async def good() -> int:
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        return 2

    @stage()
    async def after(a: int = 0, b: int = 0) -> None:
        seen.append((a, b))

    state = await run_workflow(Workflow("w", Parallel([partly, fail], good, on_error="skip"), after))
    assert (state, seen) == ({"b": 2}, [(0, 2)])


async def test_a_parallel_in_a_loop_joins_each_turn(run_workflow: Any) -> None:
    @stage(writes="a")
    async def left(i: int, a: int = 0) -> int:
        return a + i

    @stage(writes="b")
    async def right(i: int, a: int = 0) -> int:
        return a

    assert await run_workflow(Workflow("w", Loop("i", lambda: [1, 2, 3], Parallel(left, right)))) == {"a": 6, "b": 3}


@virtual
async def test_a_failure_before_the_cancellation_is_what_is_reported(run_workflow: Any) -> None:
    with pytest.raises(StageFailed, match="w/x: "), anyio.move_on_after(5):
        await run_workflow(Workflow("w", Parallel(failing("x", after=1, closing=20), failing("y", after=50))))


@virtual
async def test_a_cancelled_parallel_whose_clean_up_fails_stays_cancelled(run_workflow: Any) -> None:
    branch = failing("x", after=100, cleanup=OSError("bad"))
    with anyio.move_on_after(5) as scope:
        await run_workflow(Workflow("w", Parallel(branch, failing("y", after=50))), RunConfig())
    assert scope.cancelled_caught
