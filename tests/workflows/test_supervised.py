"""The supervised workflow on the noop backend, whose little model really learns."""

from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.errors import VersionNotFound
from crucible_kitchen.events import Event, TrainingCheckpoint, TrainingEpoch, TrainingStep
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.runs import RunResult

pytestmark = pytest.mark.anyio


async def run(kitchen: Kitchen, config: dict[str, Any], **adapters: Any) -> tuple[RunResult, list[Event]]:
    """Run to the end and return the result and all events."""
    async with kitchen:
        handle = await kitchen.start("supervised", config, adapters=adapters)
        events = [record.event async for record in handle.events()]
        return await handle.wait(), events


def losses(events: list[Event]) -> list[float]:
    """Return the loss of every step."""
    return [e.loss for e in events if isinstance(e, TrainingStep)]


async def test_a_run_evaluates_and_registers_with_lineage(kitchen: Kitchen, config: dict[str, Any]) -> None:
    result, events = await run(kitchen, {**config, "epochs": 2})
    assert result.status == "completed"
    assert {"accuracy", "f1", "precision", "recall", "n", "intervals"} <= result.state.eval_results.keys()
    model = result.state.registered_model
    assert model.id == "supervised-noop-noop:1"
    assert model.lineage["run"] == result.run_id
    assert model.lineage["config_hash"] == result.manifest["config_hash"]
    assert len(model.lineage["dataset_fingerprint"]) == 64
    assert model.synthetic, "what a noop backend made can never be promoted"
    names = [e.name for e in events]
    for name in (
        "workflow.start",
        "data.prepared",
        "training.step",
        "training.epoch",
        "eval.complete",
        "model.registered",
        "workflow.stop",
    ):
        assert name in names
    assert names.count("stage.start") == names.count("stage.stop")
    assert {a.kind for a in result.artifacts} == {"checkpoint", "weights", "report"}


async def test_the_loss_falls(kitchen: Kitchen, config: dict[str, Any]) -> None:
    _, events = await run(kitchen, {**config, "epochs": 8})
    first, *_, last = losses(events)
    assert last < first


async def test_the_last_partial_batch_is_trained_and_every_row_once_per_epoch(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    _, events = await run(kitchen, {**config, "dataset_size": 40, "batch_size": 16, "epochs": 2})
    steps = [e for e in events if isinstance(e, TrainingStep)]
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6]
    assert [e.steps for e in events if isinstance(e, TrainingEpoch)] == [3, 3]


async def test_max_steps_ends_in_the_middle_of_an_epoch(kitchen: Kitchen, config: dict[str, Any]) -> None:
    _, events = await run(kitchen, {**config, "epochs": 9, "max_steps": 4})
    assert len(losses(events)) == 4


async def test_max_steps_shortens_the_schedule_too(kitchen: Kitchen, config: dict[str, Any]) -> None:
    _, events = await run(kitchen, {**config, "epochs": 9, "max_steps": 4, "lr_schedule": "linear"})
    rates = [e.lr for e in events if isinstance(e, TrainingStep)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < rates[0] / 2


async def test_zero_epochs_train_nothing_and_still_register(kitchen: Kitchen, config: dict[str, Any]) -> None:
    result, events = await run(kitchen, {**config, "epochs": 0})
    assert losses(events) == []
    assert result.state.registered_model.version == 1


async def test_gradient_accumulation_gives_the_same_losses_as_one_large_batch(
    kitchen: Kitchen, config: dict[str, Any], home: Path
) -> None:
    _, whole = await run(kitchen, {**config, "batch_size": 16, "epochs": 2})
    other = Kitchen({**_noop()}, home=home / "other")
    _, split = await run(other, {**config, "batch_size": 4, "gradient_accumulation": 4, "epochs": 2})
    assert losses(split) == pytest.approx(losses(whole), rel=1e-9)


async def test_the_same_seed_gives_the_same_run_and_another_seed_another(home: Path, config: dict[str, Any]) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        _, events = await run(Kitchen(_noop(), home=home / str(number)), {**config, "seed": seed})
        runs.append(losses(events))
    assert runs[0] == runs[1] != runs[2]


async def test_checkpoints_are_saved_when_due(kitchen: Kitchen, config: dict[str, Any]) -> None:
    result, events = await run(kitchen, {**config, "epochs": 2, "save_every": 2})
    assert [e.step for e in events if isinstance(e, TrainingCheckpoint)] == [2, 4, 6]
    assert [a.name for a in result.artifacts if a.kind == "checkpoint"] == ["step-4", "step-6"], "the last two are kept"


async def test_without_an_evaluator_the_result_is_absent_and_never_zero(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    result, events = await run(kitchen, config, evaluator=None)
    assert "eval_results" not in result.state
    assert "eval.complete" not in [e.name for e in events]
    assert result.state.registered_model.metrics == {}


async def test_without_a_registry_the_weights_are_still_stored(kitchen: Kitchen, config: dict[str, Any]) -> None:
    result, _ = await run(kitchen, config, model_registry=None)
    assert "registered_model" not in result.state
    assert result.state.final_weights.uri.startswith("blob://sha256/")


async def test_early_stopping_ends_the_run_after_evaluations_without_progress(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    settings = {**config, "epochs": 50, "eval_every": 1, "early_stopping": 2, "learning_rate": 1e-12}
    _, events = await run(kitchen, settings)
    assert len(losses(events)) == 3, "the first evaluation is the best, the next two are not better"


async def test_save_best_returns_to_the_best_state(kitchen: Kitchen, config: dict[str, Any]) -> None:
    settings = {**config, "epochs": 2, "eval_every": 1, "save_best": True, "learning_rate": 1e-12}
    result, _ = await run(kitchen, settings)
    assert result.state.best.step == 1
    assert result.state.eval_results["step"] == 1
    assert result.state.registered_model.lineage["steps"] == 1


async def test_a_rollback_takes_the_registration_back_when_a_later_stage_fails(
    home: Path, config: dict[str, Any]
) -> None:
    from crucible_kitchen.workflow.stage import stage
    from crucible_kitchen.workflows.supervised import supervised

    @stage()
    async def deploy() -> None:
        raise RuntimeError("nobody answers")

    kitchen = Kitchen(_noop(), home=home)
    registry = kitchen.registry.build_adapter("model_registry", "noop", {}, home)
    failing = supervised.insert_after("register_model", deploy)
    with pytest.raises(Exception, match="nobody answers"):
        await kitchen.run(failing, {**config, "on_failure": "rollback"}, adapters={"model_registry": registry})
    assert await registry.versions() == []
    with pytest.raises(Exception, match="nobody answers"):
        await kitchen.run(failing, config, adapters={"model_registry": registry})
    assert len(await registry.versions()) == 1


def _noop() -> dict[str, str]:
    return dict.fromkeys(("training_client", "dataset_store", "evaluator", "model_registry", "blob_store"), "noop")


async def test_an_unknown_parent_is_refused_before_anything_is_trained(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    async with kitchen:
        handle = await kitchen.start("supervised", {**config, "parent_model": "nosuch:9"})
        events = [record.event async for record in handle.events()]
        with pytest.raises(VersionNotFound) as caught:
            await handle.wait()
    assert caught.value.where == "supervised/check_parent"
    assert losses(events) == []


async def test_a_known_parent_stands_in_the_lineage(kitchen: Kitchen, config: dict[str, Any]) -> None:
    registry = kitchen.registry.build_adapter("model_registry", "noop", {}, Path())
    async with kitchen:
        first = await kitchen.run("supervised", config, adapters={"model_registry": registry})
        parent = first.state.registered_model.id
        second = await kitchen.run(
            "supervised", {**config, "parent_model": parent}, adapters={"model_registry": registry}
        )
    child = second.state.registered_model
    assert [v.id for v in await registry.lineage(child.name, child.version)] == [child.id, parent]
