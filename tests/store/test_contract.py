"""What every run store promises; held against SQLite and against its twin in memory (there also on virtual time)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen.errors import Conflict, RunNotFound, StoreError
from crucible_kitchen.events import EventRecord, TrainingStep, WarningRaised, WorkflowStart, WorkflowStop
from crucible_kitchen.store import RunRecord, RunStore
from crucible_kitchen.types import BlobRef

pytestmark = pytest.mark.anyio


@pytest.fixture(
    params=["sqlite-asyncio", "sqlite-trio", "memory-asyncio", "memory-trio-virtual-time", "faultless-asyncio"]
)
def kind(request: Any) -> str:
    return str(request.param)


def record(run_id: str, seq: int, message: str = "m") -> EventRecord:
    return EventRecord(run_id, seq, 1.5 * seq, WarningRaised(code="c", message=message))


async def started(store: RunStore, run_id: str = "run-1", **more: Any) -> str:
    await store.create_run(RunRecord(run_id, more.pop("workflow", "supervised"), **more))
    return run_id


async def test_a_run_is_found_as_it_was_created(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run = RunRecord("a1", "supervised", config={"epochs": 3, "tags": ["x"]}, config_hash="ff", created_at=12.25)
        await store.create_run(run)
        assert await store.run("a1") == run


async def test_a_run_ends_once_with_its_result(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        await store.finish_run(run_id, "failed", {"loss": 0.5}, {"code": "data", "message": "bad"})
        run = await store.run(run_id)
        assert (run.status, run.finished_at, run.result) == ("failed", 99.5, {"loss": 0.5})
        assert run.error == {"code": "data", "message": "bad"}
        with pytest.raises(Conflict):
            await store.finish_run(run_id, "completed", {})


async def test_an_id_is_taken_once(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        await started(store)
        with pytest.raises(Conflict):
            await started(store)
        store.append([record("run-1", 1)])
        await store.flush("run-1", 1)


async def test_a_unique_prefix_names_a_run(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        for run_id in ("abc1", "abd2", "ab", "ABC9", "a_c"):
            await started(store, run_id)
        assert (await store.run("abc")).run_id == "abc1"
        assert (await store.run("ab")).run_id == "ab"
        for wrong in ("a", "", "zz", "%", "ab_1"):
            with pytest.raises(RunNotFound):
                await store.run(wrong)


async def test_the_newest_runs_come_first_and_can_be_filtered(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        for i in range(4):
            await started(store, f"r{i}", created_at=float(i // 2), workflow="dpo" if i == 1 else "supervised")
        await store.finish_run("r3", "completed", {})
        assert [r.run_id for r in await store.runs()] == ["r3", "r2", "r1", "r0"]
        assert [r.run_id for r in await store.runs(limit=2)] == ["r3", "r2"]
        assert [r.run_id for r in await store.runs(status="completed")] == ["r3"]
        assert [r.run_id for r in await store.runs(status="running", workflow="dpo")] == ["r1"]


async def test_a_log_is_read_back_from_any_cursor(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        log = [
            EventRecord(run_id, 1, 0.1, WorkflowStart(recipe="supervised", config={"model": "tiny", "x": 0.1})),
            EventRecord(
                run_id, 2, 0.2, TrainingStep(step=1, epoch=0, loss=0.3, lr=1e-3, tokens_per_sec=9.5, grad_norm=2.0)
            ),
            EventRecord(run_id, 3, 0.3, WorkflowStop(recipe="supervised", status="completed", duration_s=1.0)),
        ]
        store.append(log[:1])
        store.append(log[1:])
        await store.flush(run_id, 3)
        assert await store.read(run_id, 0, 10) == log
        assert await store.read(run_id, 1, 1) == log[1:2]
        assert await store.read(run_id, 3, 10) == []
        assert await store.read("unknown", 0, 10) == []


async def test_what_was_flushed_is_durable_and_nothing_waits(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        assert store.durable(run_id) == 0
        store.append([record(run_id, seq) for seq in range(1, 1001)])
        await store.flush(run_id, 1000)
        assert store.durable(run_id) == 1000
        assert store.pending == 0
        await store.flush(run_id, 3)
        await store.drain()


async def test_an_unhurried_record_becomes_durable_by_itself(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        store.append([record(run_id, 1)])
        with anyio.fail_after(5):
            assert await store.durable_after(run_id, 0) == 1


async def test_a_waiter_for_the_next_record_is_woken_by_it(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        seen: list[int] = []

        async def wait() -> None:
            seen.append(await store.durable_after(run_id, 0))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert seen == []
            store.append([record(run_id, 1)])
            await store.flush(run_id, 1)
        assert seen == [1]


async def test_many_lanes_share_one_log_without_gaps(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        last = 0

        async def lane() -> None:
            nonlocal last
            for _ in range(20):
                last += 1
                mine = last
                store.append([record(run_id, mine, str(mine))])
                await store.flush(run_id, mine)
                assert store.durable(run_id) >= mine

        async with anyio.create_task_group() as group:
            for _ in range(32):
                group.start_soon(lane)
        assert [r.seq for r in await store.read(run_id, 0, 10_000)] == list(range(1, 641))


async def test_a_gap_in_a_log_is_refused(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        with pytest.raises(StoreError):
            store.append([record(run_id, 2)])
        store.append([record(run_id, 1)])
        with pytest.raises(StoreError):
            store.append([record(run_id, 1)])
        with pytest.raises(StoreError, match="never appended"):
            await store.flush(run_id, 2)


async def test_a_log_that_is_not_open_here_is_refused(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        with pytest.raises(RunNotFound):
            store.append([record("nobody", 1)])


async def test_a_cancelled_flush_leaves_the_store_usable(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        store.append([record(run_id, 1)])
        with anyio.CancelScope() as scope:
            scope.cancel()
            await store.flush(run_id, 1)
        await store.flush(run_id, 1)
        assert store.durable(run_id) == 1


async def test_odd_values_never_lose_a_record(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        odd = {"nan": float("nan"), "tuple": (1, 2), "path": Path("a"), "half": "a\ud800b"}
        store.append([EventRecord(run_id, 1, 0.0, WorkflowStart(recipe="r", config=odd))])
        await store.flush(run_id, 1)
        (back,) = await store.read(run_id, 0, 9)
        assert isinstance(back.event, WorkflowStart)
        assert back.event.config["tuple"] == [1, 2]
        assert back.event.config["half"] == "a\ud800b"
        assert back.event.config["nan"] != back.event.config["nan"]


async def test_artifacts_are_listed_in_order_and_once(make: Callable[[], RunStore]) -> None:
    async with make() as store:
        run_id = await started(store)
        report = BlobRef("blob://sha256/bb", "bb", 2, "report", "eval")
        weights = BlobRef("blob://sha256/aa", "aa", 1, "weights", "final")
        for artifact in (report, weights, report):
            await store.put_artifact(run_id, artifact)
        assert await store.artifacts(run_id) == [report, weights]
        with pytest.raises(RunNotFound):
            await store.put_artifact("nobody", report)


async def test_a_manifest_comes_with_its_run_and_stays_until_an_attempt_brings_another(
    make: Callable[[], RunStore],
) -> None:
    async with make() as store:
        assert await store.manifest(await started(store, "without")) is None
        await store.create_run(RunRecord("r", "w"), manifest={"seed": 1})
        assert await store.manifest("r") == {"seed": 1}
        for given, kept in ((None, {"seed": 1}), ({"seed": 2, "packages": {"torch": "x"}},) * 2):
            await store.finish_run("r", "failed", {})
            await store.open_attempt("r", manifest=given)
            assert await store.manifest("r") == kept


async def test_closing_writes_what_waits_and_wakes_who_waits(make: Callable[[], RunStore]) -> None:
    store = make()
    await store.open()
    run_id = await started(store)
    outcomes: list[str] = []

    async def wait() -> None:
        try:
            await store.durable_after(run_id, 1)
        except StoreError as error:
            outcomes.append(error.message)

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        store.append([record(run_id, 1)])
        await store.aclose()
    assert outcomes == ["the run store is closed"]
    assert store.durable(run_id) == 1
    with pytest.raises(StoreError, match="closed"):
        store.append([record(run_id, 2)])
    await store.aclose()
