"""Worker processes: what they return, what ends them, and that nothing of them is left."""

import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from crucible_kitchen.errors import WorkerDied, WorkerRaised, WorkerTimeout
from crucible_kitchen.workers import ProcessLane, ProcessPool, inline

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The worker finds modules where this process would, whenever the worker starts."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    yield
    sys.modules.pop("misbehaving", None)


@pytest.fixture
async def lane(on_the_path: None) -> AsyncIterator[ProcessLane]:
    async with ProcessLane("test", timeout=60) as lane:
        yield lane


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that waits for somebody else to reap it has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def test_a_call_returns_what_the_function_returned(lane: ProcessLane) -> None:
    assert await lane.call("misbehaving:add", 2, 3) == 5


async def test_a_lane_keeps_one_process_and_its_state(lane: ProcessLane) -> None:
    assert [await lane.call("misbehaving:count") for _ in range(3)] == [1, 2, 3]
    assert await lane.call("misbehaving:pid") == lane.pid != os.getpid()


async def test_calls_of_one_lane_run_one_after_the_other(lane: ProcessLane) -> None:
    found: list[int] = []

    async def ask() -> None:
        found.append(await lane.call("misbehaving:count"))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(ask)
    assert found == [1, 2, 3, 4, 5]


async def test_what_a_function_prints_is_not_taken_for_an_answer(lane: ProcessLane) -> None:
    assert await lane.call("misbehaving:say", "hello") == "hello"


async def test_a_function_cannot_read_the_calls(lane: ProcessLane) -> None:
    assert await lane.call("misbehaving:read_input") == ""


async def test_an_exception_says_what_and_where_and_leaves_the_process(lane: ProcessLane) -> None:
    said = r"misbehaving:fail raised ValueError at .*misbehaving.py:\d+: it says \.\.\."
    with pytest.raises(WorkerRaised, match=said) as caught:
        await lane.call("misbehaving:fail", "no")
    assert caught.value.error == "ValueError"
    assert lane.starts == 1
    assert await lane.call("misbehaving:add", 1, 1) == 2
    assert lane.starts == 1


@pytest.mark.parametrize(
    ("function", "error"),
    [("leave", "SystemExit"), ("not_json", "TypeError"), ("nothing", "AttributeError")],
)
async def test_what_is_no_result_is_an_error(lane: ProcessLane, function: str, error: str) -> None:
    with pytest.raises(WorkerRaised) as caught:
        await lane.call(f"misbehaving:{function}")
    assert caught.value.error == error


async def test_a_module_that_does_not_exist_is_an_error(lane: ProcessLane) -> None:
    with pytest.raises(WorkerRaised, match="no_such_module"):
        await lane.call("no_such_module:f")


async def test_a_process_that_crashes_is_reported_and_replaced(lane: ProcessLane) -> None:
    with pytest.raises(WorkerDied, match="by signal 11"):
        await lane.call("misbehaving:crash")
    assert await lane.call("misbehaving:count") == 1
    assert lane.starts == 2


@pytest.mark.parametrize("function", ["spin", "spin_in_c", "hold_the_interpreter", "catch_everything"])
async def test_what_never_returns_is_ended_in_time_and_the_lane_is_free_again(lane: ProcessLane, function: str) -> None:
    await lane.call("misbehaving:count")
    pid = lane.pid
    assert pid is not None
    with anyio.fail_after(20), pytest.raises(WorkerTimeout, match=f"misbehaving:{function} did not return within"):
        await lane.call(f"misbehaving:{function}", timeout=0.2)
    assert gone(pid)
    assert await lane.call("misbehaving:add", 1, 2) == 3


async def test_everything_a_killed_function_started_is_killed_with_it(lane: ProcessLane, tmp_path: Path) -> None:
    written = tmp_path / "pids"
    os.mkfifo(written)
    async with anyio.create_task_group() as group:
        group.start_soon(lane.call, "misbehaving:leave_daemons", str(written))
        with anyio.fail_after(30):
            read = await anyio.to_thread.run_sync(written.read_text, abandon_on_cancel=True)
        group.cancel_scope.cancel()
    child, daemon = map(int, read.split())
    assert gone(child)
    assert gone(daemon)


async def test_closing_a_lane_leaves_no_process(on_the_path: None) -> None:
    async with ProcessLane("test", timeout=60) as lane:
        pid = await lane.call("misbehaving:pid")
    assert gone(pid)
    with pytest.raises(RuntimeError, match="closed"):
        await lane.call("misbehaving:pid")


async def test_a_worker_can_be_given_an_environment_of_its_own(
    on_the_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRUCIBLE_TEST_SECRET", "canary")
    async with ProcessLane("test", timeout=60, environment={"A": "1"}) as lane:
        found = await lane.call("misbehaving:environment")
    assert found["A"] == "1"
    assert "CRUCIBLE_TEST_SECRET" not in found


async def test_a_pool_runs_as_many_calls_at_once_as_it_has_processes(on_the_path: None) -> None:
    async with ProcessPool("test", size=2, timeout=60) as pool:
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(pool.call, "misbehaving:catch_everything")
            with anyio.fail_after(30):
                while pool.busy < 2:
                    await anyio.lowlevel.checkpoint()
            with anyio.move_on_after(0.05) as waited:
                await pool.call("misbehaving:add", 1, 1)
            assert waited.cancelled_caught, "a third call waits for a place"
            group.cancel_scope.cancel()
        assert pool.busy == 0
        assert await pool.call("misbehaving:add", 1, 1) == 2


async def test_a_hanging_call_gives_its_place_back(on_the_path: None) -> None:
    async with ProcessPool("test", size=1, timeout=0.2) as pool:
        for _ in range(2):
            with pytest.raises(WorkerTimeout):
                await pool.call("misbehaving:spin")
        assert pool.busy == 0
        assert await pool.call("misbehaving:add", 1, 1, timeout=30) == 2


async def test_inline_calls_run_in_this_process(on_the_path: None) -> None:
    with inline():
        async with ProcessPool("test", size=1, timeout=1) as pool:
            assert await pool.call("misbehaving:pid") == os.getpid()
