"""Runs that go on: what a later attempt of a run finds, keeps and refuses."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen.errors import (
    AdapterError,
    RunChanged,
    RunEnded,
    RunLive,
    RunNotFound,
    RunPaused,
    StorageFull,
    TransientBackendError,
)
from crucible_kitchen.events import TrainingStep, WarningRaised, WorkflowRolledBack, WorkflowStart
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.ports import EvalReport
from crucible_kitchen.testing.faults import corrupts, fails, with_faults
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.stage import stage
from crucible_kitchen_noop import NoopEvaluator, NoopTrainingClient

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


TEN_STEPS = {"epochs": 5, "dataset_size": 32, "save_every": 3, "grad_clip_norm": 0.5}


async def failed_at(kitchen: Kitchen, config: dict[str, Any], step: int) -> str:
    """Run until an optimizer step fails; return the run's id."""
    broken = with_faults(NoopTrainingClient(), fails("apply", TransientBackendError("lost"), call=step + 1))
    handle = await kitchen.start("supervised", config, adapters={"training_client": broken})
    with pytest.raises(TransientBackendError):
        await handle.wait()
    return handle.id


def files_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def weights(result: Any) -> str:
    return next(a.sha256 for a in result.artifacts if a.kind == "weights")


async def test_a_failed_run_goes_on_from_its_checkpoint_to_the_same_weights(
    noop: dict[str, Any], home: Path, config: dict[str, Any]
) -> None:
    config = {**config, **TEN_STEPS}
    calm = await Kitchen(noop, home=home / "calm").run("supervised", config)
    async with Kitchen(noop, home=home / "wild") as kitchen:
        run_id = await failed_at(kitchen, config, 5)
        handle = await kitchen.reopen(run_id, adapters={"training_client": with_faults(NoopTrainingClient())})
        events = [record.event async for record in handle.events()]
        result = await handle.wait()
        attempts = await kitchen.store.attempts(run_id)
    assert weights(result) == weights(calm)
    assert [e.step for e in events if isinstance(e, TrainingStep)] == [4, 5, 6, 7, 8, 9, 10]
    assert [e.attempt for e in events if isinstance(e, WorkflowStart)] == [2]
    assert [e.step for e in events if isinstance(e, WorkflowRolledBack)] == [3]
    assert [a.status for a in attempts] == ["failed", "completed"]
    assert result.metrics == {**calm.metrics, **{k: v for k, v in result.metrics.items() if k.endswith("per_sec")}}
    assert result.state.eval_results == calm.state.eval_results


async def test_checkpoints_that_are_gone_are_no_artifacts_whichever_attempt_made_them(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    async with kitchen:
        run_id = await failed_at(kitchen, {**config, **TEN_STEPS}, 5)
        assert [artifact.name for artifact in await kitchen.store.artifacts(run_id)] == ["step-3"]
        result = await kitchen.resume(run_id, adapters={"training_client": with_faults(NoopTrainingClient())})
        kept = await kitchen.store.artifacts(run_id)
    saved = [artifact for artifact in kept if artifact.kind == "checkpoint"]
    assert sorted(artifact.uri.rpartition("/")[2] for artifact in saved) == files_of(kitchen.home / "runs" / run_id)
    assert set(kept) == set(result.artifacts)


async def test_a_run_keeps_the_last_the_best_and_every_nth_checkpoint_as_its_config_says(
    noop: dict[str, Any], home: Path, config: dict[str, Any]
) -> None:
    accuracies = itertools.chain([0.1, 0.9, 0.8], itertools.repeat(0.0))

    def graded(report: EvalReport) -> EvalReport:
        return replace(report, metrics={**report.metrics, "accuracy": next(accuracies)})

    evaluator = with_faults(NoopEvaluator(), corrupts("evaluate", graded, times=0))
    keep = {"save_every": 1, "eval_every": 1, "keep_last": 1, "keep_best": 2, "keep_every": 4}
    result = await Kitchen({**noop, "evaluator": evaluator}, home=home).run(
        "supervised", {**config, **TEN_STEPS, **keep}
    )
    kept = [artifact.name for artifact in result.artifacts if artifact.kind == "checkpoint"]
    assert kept == ["step-2", "step-3", "step-4", "step-8", "step-10"]
    assert len(files_of(home / "runs" / result.run_id)) == len(kept)


async def test_a_drained_run_is_paused_and_goes_on(noop: dict[str, Any], home: Path, config: dict[str, Any]) -> None:
    config = {**config, **TEN_STEPS}
    calm = await Kitchen(noop, home=home / "calm").run("supervised", config)
    async with Kitchen(noop, home=home / "wild") as kitchen:
        handle = await kitchen.start("supervised", config)
        async for record in handle.events():
            if isinstance(record.event, TrainingStep) and record.event.step == 4:
                await handle.drain()
        with pytest.raises(RunPaused):
            await handle.wait()
        assert (await kitchen.store.run(handle.id)).status == "paused"
        result = await kitchen.resume(handle.id)
    assert weights(result) == weights(calm)


async def test_another_config_is_refused_by_name_and_allowed_by_name(kitchen: Kitchen, config: dict[str, Any]) -> None:
    config = {**config, **TEN_STEPS}
    async with kitchen:
        run_id = await failed_at(kitchen, config, 5)
        client = {"training_client": with_faults(NoopTrainingClient())}
        with pytest.raises(RunChanged, match=r"learning_rate was None, is 0\.5") as refused:
            await kitchen.resume(run_id, {"learning_rate": 0.5}, adapters=client)
        assert refused.value.hint == "resume it nevertheless: --allow-changed learning_rate"
        result = await kitchen.resume(run_id, {"learning_rate": 0.5}, adapters=client, allow_changed=["learning_rate"])
    assert result.manifest["config"]["learning_rate"] == 0.5
    assert result.manifest["changed"] == ["learning_rate"]


async def test_another_dataset_is_refused(home: Path, noop: dict[str, Any], config: dict[str, Any]) -> None:
    rows = home / "rows.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)

    def write(last: str) -> None:
        texts = [{"prompt": f"{n}", "completion": last} for n in range(40)]
        rows.write_text("\n".join(json.dumps(row) for row in texts))

    write("no")
    config = {**config, **TEN_STEPS, "dataset": str(rows)}
    adapters = {**noop, "dataset_store": "files"}
    async with Kitchen(adapters, home=home) as kitchen:
        run_id = await failed_at(kitchen, config, 5)
        write("maybe")
        client = {"training_client": with_faults(NoopTrainingClient())}
        with pytest.raises(RunChanged, match="dataset was"):
            await kitchen.resume(run_id, adapters=client)
        assert (await kitchen.resume(run_id, adapters=client, allow_changed=["dataset"])).status == "completed"


async def test_another_workflow_of_the_same_name_is_refused(kitchen: Kitchen) -> None:
    @stage(writes="x")
    async def first() -> int:
        return 1

    @stage(writes="x", name="first")
    async def other() -> int:
        return 2

    @stage()
    async def fail(x: int) -> None:
        raise TransientBackendError("not yet")

    async with kitchen:
        handle = await kitchen.start(Workflow("w", first, fail))
        with pytest.raises(TransientBackendError):
            await handle.wait()
        with pytest.raises(RunChanged, match="code was"):
            await kitchen.resume(handle.id, target=Workflow("w", other, fail))


async def test_a_run_that_is_unknown_completed_or_under_way_cannot_be_resumed(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    started = anyio.Event()

    @stage()
    async def wait() -> None:
        started.set()
        await anyio.sleep_forever()

    async with kitchen:
        with pytest.raises(RunNotFound):
            await kitchen.resume("20200101-000000-000000")
        done = await kitchen.run("supervised", config)
        with pytest.raises(RunEnded):
            await kitchen.resume(done.run_id)
        workflow = Workflow("w", wait)
        handle = await kitchen.start(workflow)
        await started.wait()
        with pytest.raises(RunLive):
            await kitchen.resume(handle.id, target=workflow)
        await handle.cancel()


async def test_a_run_whose_adapter_is_not_installed_says_which(
    noop: dict[str, Any], home: Path, config: dict[str, Any]
) -> None:
    config = {**config, **TEN_STEPS}
    async with Kitchen(noop, home=home) as kitchen:
        run_id = await failed_at(kitchen, config, 5)
        manifest = await kitchen.store.manifest(run_id)
        assert manifest is not None
        manifest["adapters"]["evaluator"]["name"] = "absent"
        await kitchen.store.open_attempt(run_id, manifest=manifest)
        await kitchen.store.finish_run(run_id, "failed", {})
        with pytest.raises(AdapterError, match="the port 'evaluator' has no adapter 'absent'"):
            await kitchen.resume(run_id, adapters={"training_client": with_faults(NoopTrainingClient())})


async def test_adapters_are_made_again_as_they_were_named(
    home: Path, noop: dict[str, Any], config: dict[str, Any]
) -> None:
    adapters = {**noop, "training_client": ("noop", {"latency": 0.0})}
    config = {**config, **TEN_STEPS}
    async with Kitchen(adapters, home=home) as kitchen:
        handle = await kitchen.start("supervised", config)
        async for record in handle.events():
            if isinstance(record.event, TrainingStep) and record.event.step == 2:
                await handle.cancel()
    result = await Kitchen(home=home).resume(handle.id)
    assert result.status == "completed"
    assert result.manifest["adapters"]["training_client"]["name"] == "noop"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [Path.unlink, cut, flip])
async def test_a_checkpoint_whose_file_is_gone_cut_or_changed_is_passed_over_with_a_warning(
    noop: dict[str, Any], home: Path, config: dict[str, Any], harm: Callable[[Path], None]
) -> None:
    config = {**config, **TEN_STEPS}
    calm = await Kitchen(noop, home=home / "calm").run("supervised", config)
    async with Kitchen(noop, home=home / "wild") as kitchen:
        run_id = await failed_at(kitchen, config, 8)
        harm(kitchen.home / "runs" / run_id / "checkpoint-000002.npz")
        handle = await kitchen.reopen(run_id, adapters={"training_client": with_faults(NoopTrainingClient())})
        events = [record.event async for record in handle.events()]
        result = await handle.wait()
    assert weights(result) == weights(calm)
    assert [e.code for e in events if isinstance(e, WarningRaised)] == ["checkpoint.damaged"]
    assert [e.step for e in events if isinstance(e, WorkflowRolledBack)] == [3]


async def test_a_disk_that_is_full_while_a_checkpoint_is_written_fails_the_run_which_goes_on_when_there_is_room(
    noop: dict[str, Any], home: Path, config: dict[str, Any]
) -> None:
    config = {**config, **TEN_STEPS}
    calm = await Kitchen(noop, home=home / "calm").run("supervised", config)
    full = with_faults(NoopTrainingClient(), fails("save_state", StorageFull("the disk is full"), call=2, late=True))
    async with Kitchen(noop, home=home / "wild") as kitchen:
        handle = await kitchen.start("supervised", config, adapters={"training_client": full})
        with pytest.raises(StorageFull) as told:
            await handle.wait()
        assert told.value.where is not None
        assert told.value.where.endswith("/save_checkpoint")
        result = await kitchen.resume(handle.id, adapters={"training_client": with_faults(NoopTrainingClient())})
    assert weights(result) == weights(calm)
