"""A run from the outside: its result, its events, its end."""

import os
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from crucible_kitchen.errors import (
    AdapterError,
    ConfigError,
    NotFoundError,
    RunCancelled,
    StageFailed,
    StorageFull,
    WorkflowError,
)
from crucible_kitchen.events import WorkflowStart, WorkflowStop
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.runs import RunResult
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

pytestmark = pytest.mark.anyio


@stage(writes="answer")
async def answer() -> int:
    """Write a number."""
    return 42


@stage()
async def break_down() -> None:
    """Fail."""
    raise RuntimeError("the stove is cold")


@stage()
async def wait_for_ever() -> None:
    """Wait until somebody cancels."""
    await anyio.sleep_forever()


async def test_a_run_alone_opens_and_closes_its_kitchen(home: Path) -> None:
    result = await Kitchen(home=home).run(Workflow("simple", answer))
    assert result.status == "completed"
    assert result.state.answer == 42
    assert result.state["answer"] == 42
    assert result.state.get("answer", int) == 42
    with pytest.raises(AttributeError, match="answer"):
        _ = result.state.question
    with pytest.raises(TypeError):
        result.state.get("answer", str)


async def test_the_log_begins_with_the_start_counts_without_gaps_and_ends_with_the_stop(kitchen: Kitchen) -> None:
    async with kitchen:
        run = await kitchen.start(Workflow("simple", answer))
        records = [record async for record in run.events()]
        result = await run.wait()
        stored = await kitchen.store.read(run.id, 0, 100)
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert isinstance(records[0].event, WorkflowStart)
    assert isinstance(records[-1].event, WorkflowStop)
    assert records[-1].event.status == result.status == "completed"
    assert stored == records


async def test_events_can_be_read_from_a_place_after_the_run_has_ended(kitchen: Kitchen) -> None:
    async with kitchen:
        run = await kitchen.start(Workflow("simple", answer))
        await run.wait()
        assert [r.seq async for r in run.events(after=2)] == [3, 4]


async def test_a_failure_names_its_stage_and_status_store_and_last_event_agree(kitchen: Kitchen) -> None:
    async with kitchen:
        run = await kitchen.start(Workflow("simple", answer, break_down))
        with pytest.raises(StageFailed) as caught:
            await run.wait()
        records = [record async for record in run.events()]
        row = await kitchen.store.run(run.id)
    assert caught.value.where == "simple/break_down"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert run.status == row.status == records[-1].event.to_json()["status"] == "failed"
    assert row.error is not None
    assert row.error["code"] == "stage.failed"
    assert row.error["where"] == "simple/break_down"


async def test_cancel_returns_when_nothing_is_left_and_wait_says_so(kitchen: Kitchen) -> None:
    async with kitchen:
        run = await kitchen.start(Workflow("simple", wait_for_ever))
        async for record in run.events():
            if record.event.name == "stage.start":
                break
        await run.cancel()
        await run.cancel()
        with pytest.raises(RunCancelled):
            await run.wait()
        row = await kitchen.store.run(run.id)
        last = [record async for record in run.events()][-1]
    assert run.status == row.status == last.event.to_json()["status"] == "cancelled"


async def test_a_cancelled_caller_cancels_its_run(kitchen: Kitchen) -> None:
    async with kitchen:
        with anyio.move_on_after(0.2):
            await kitchen.run(Workflow("simple", wait_for_ever))
        (row,) = await kitchen.store.runs()
    assert row.status == "cancelled"


async def test_runs_of_one_kitchen_do_not_disturb_each_other(kitchen: Kitchen) -> None:
    results: list[RunResult] = []

    async def one() -> None:
        results.append(await kitchen.run(Workflow("simple", answer)))

    async with kitchen, anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(one)
    assert len({r.run_id for r in results}) == 8
    assert all(r.state.answer == 42 for r in results)


async def test_a_dry_run_calls_no_adapter_and_writes_no_file(home: Path, config: dict[str, Any]) -> None:
    class Untouchable:
        """Fails at every call; may only be asked what it can do."""

        synthetic = True

        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            if name in ("capabilities", "public_options"):
                return getattr(self._real, name)
            if name.startswith("_") or not callable(getattr(self._real, name)):
                raise AttributeError(name)

            def called(*_: Any, **__: Any) -> None:
                raise AssertionError(f"a dry run called {name}")

            return called

    kitchen = Kitchen(home=home)
    adapters = {
        port: Untouchable(kitchen.registry.build_adapter(port, "noop", {}, home))
        for port in ("training_client", "dataset_store", "evaluator", "model_registry", "blob_store")
    }
    result = await kitchen.run("supervised", config, adapters=adapters, dry_run=True)
    assert result.status == "validated"
    assert os.listdir(home) == []


async def test_a_misspelt_key_names_the_nearest_one(kitchen: Kitchen, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="learning_rat") as caught:
        await kitchen.run("supervised", {**config, "learning_rat": 1e-3}, dry_run=True)
    assert caught.value.hint is not None
    assert "'learning_rate'" in caught.value.hint


async def test_a_value_of_the_wrong_type_is_refused(kitchen: Kitchen, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        await kitchen.run("supervised", {**config, "batch_size": "many"}, dry_run=True)


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ({"training_client": "torhc"}, "torch"),
        ({"trainer": "torch"}, "training_client"),
        ({"training_client": ("noop", {"latncy": 1})}, "latency"),
    ],
)
async def test_a_wrong_adapter_port_or_option_names_what_there_is(
    home: Path, config: dict[str, Any], adapters: dict[str, Any], expected: str
) -> None:
    with pytest.raises(AdapterError) as caught:
        await Kitchen(home=home).run("supervised", config, adapters=adapters, dry_run=True)
    assert expected in (caught.value.hint or "")


async def test_a_missing_adapter_is_found_by_the_check(home: Path, config: dict[str, Any]) -> None:
    with pytest.raises(WorkflowError, match="blob_store"):
        await Kitchen(home=home).run("supervised", config, adapters={"blob_store": None}, dry_run=True)


async def test_an_unknown_workflow_names_the_nearest_one(kitchen: Kitchen) -> None:
    with pytest.raises(NotFoundError) as caught:
        await kitchen.run("supervized", {})
    assert "'supervised'" in (caught.value.hint or "")


async def test_metrics_are_served_while_the_kitchen_is_open(home: Path) -> None:
    async with Kitchen(home=home, metrics_port=0) as kitchen:
        await kitchen.run(Workflow("simple", answer))
        async with httpx.AsyncClient() as client:
            page = (await client.get(f"http://127.0.0.1:{kitchen.metrics_port}/metrics")).text
    assert 'crucible_runs_total{status="completed",workflow="simple"} 1.0' in page


async def test_a_full_disk_while_saving_fails_the_run_at_its_stage(
    kitchen: Kitchen, config: dict[str, Any], home: Path
) -> None:
    from crucible_kitchen.testing.faults import fails, with_faults

    blobs = kitchen.registry.build_adapter("blob_store", "noop", {}, home)
    full = with_faults(blobs, fails("put_tree", StorageFull("no space left on the device", hint="free some")))
    with pytest.raises(StorageFull) as caught:
        await kitchen.run("supervised", config, adapters={"blob_store": full})
    assert caught.value.where == "supervised/save_final"


async def test_a_stage_reads_facts_of_its_run(home: Path) -> None:
    seen: dict[str, Any] = {}

    @stage()
    async def look(run: Run) -> None:
        seen.update(id=run.id, path=run.path, seed=run.seed, there=run.directory.is_dir(), key=run.idempotency_key)
        seen["draws"] = [run.rng("a").random(), run.rng("a").random(), run.rng("b").random()]

    result = await Kitchen(home=home).run(Workflow("simple", look), {"seed": 5})
    assert seen["id"] == result.run_id
    assert seen["path"] == "simple/look"
    assert seen["seed"] == 5
    assert seen["there"]
    assert seen["draws"][0] == seen["draws"][1] != seen["draws"][2]
    assert result.manifest["seed"] == 5
