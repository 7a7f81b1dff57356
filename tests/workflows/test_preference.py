"""The preference workflow on the noop backend, whose little model really learns, and on torch for its promises."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.errors import ConfigError, EmptyDataset, WorkflowError
from crucible_kitchen.events import DpoDatasetBuilt, DpoEvaluated, DpoStep, Event, WarningRaised
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.runs import RunResult
from crucible_kitchen_noop import NoopTrainingClient
from crucible_kitchen_noop.session import NoopSession

pytestmark = pytest.mark.anyio

ROWS = [{"prompt": f"{i}{c}", "chosen": c.upper(), "rejected": c + c} for i in range(10) for c in "abcd"]
FLAWED = {"prompt": "x", "chosen": "y", "rejected": "y"}
METRICS = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"}
LOSSES = ("sigmoid", "robust", "ipo", "hinge", "apo_zero", "simpo", "orpo", "kto")


def written(directory: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows into a file and return its path."""
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Forty comparisons that a bigram model can learn: answers that end in a capital are preferred."""
    return {"model": "noop", "dataset": written(tmp_path, ROWS), "batch_size": 8, "learning_rate": 0.05, "holdout": 8}


@pytest.fixture
def kitchen(home: Path) -> Kitchen:
    """A closed kitchen on noop adapters, but for the files that rows come from."""
    return Kitchen({"training_client": "noop", "evaluator": "noop", "model_registry": "noop"}, home=home)


async def run(kitchen: Kitchen, config: dict[str, Any], **adapters: Any) -> tuple[RunResult, list[Event]]:
    """Run to the end and return the result and all events."""
    async with kitchen:
        handle = await kitchen.start("preference", config, adapters=adapters)
        events = [record.event async for record in handle.events()]
        return await handle.wait(), events


def steps(events: list[Event]) -> list[DpoStep]:
    return [e for e in events if isinstance(e, DpoStep)]


@pytest.mark.parametrize("loss", LOSSES)
async def test_every_loss_learns_to_tell_held_out_answers_apart(
    kitchen: Kitchen, config: dict[str, Any], loss: str
) -> None:
    result, events = await run(kitchen, {**config, "loss": loss, "epochs": 6, "eval_at_start": True})
    assert result.state.dpo_metrics.keys() == METRICS
    before, after = result.state.eval_before, result.state.eval_results
    assert after["accuracy"] > 0.9
    assert after["margin"] > before["margin"]
    assert after["n"] == (8 if loss == "kto" else 4)  # half of what is held out is the test split
    assert steps(events)[-1].loss < steps(events)[0].loss
    assert result.state.registered_model.id.startswith("preference-noop-")


async def test_the_first_step_costs_ln_2_because_policy_and_reference_are_equal(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    result, events = await run(kitchen, {**config, "max_steps": 1, "eval_at_start": True})
    (first,) = steps(events)
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert (first.accuracy, first.beta, first.num_pairs) == (0, 0.1, 8)
    assert result.state.eval_before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.state.eval_before["accuracy"] == 0


async def test_what_was_built_and_evaluated_is_told(kitchen: Kitchen, config: dict[str, Any], tmp_path: Path) -> None:
    _, events = await run(kitchen, {**config, "dataset": written(tmp_path, [*ROWS, *[FLAWED] * 5]), "holdout": 0})
    (built,) = [e for e in events if isinstance(e, DpoDatasetBuilt)]
    assert (built.num_pairs, built.num_batches, built.batch_size, built.dropped) == (40, 5, 8, 5)
    assert built.flaws == {"equal sides": 5}
    assert {e.code for e in events if isinstance(e, WarningRaised)} >= {"data.flawed_pairs", "data.no_held_out"}
    assert not any(isinstance(e, DpoEvaluated) for e in events), "nothing was held out: nothing is claimed"


async def test_no_comparison_to_learn_from_is_an_error(
    kitchen: Kitchen, config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(EmptyDataset, match="3 with equal sides"):
        await run(kitchen, {**config, "dataset": written(tmp_path, [FLAWED] * 3), "holdout": 0})


async def test_a_batch_of_one_and_an_odd_last_batch_are_trained(kitchen: Kitchen, config: dict[str, Any]) -> None:
    _, one = await run(kitchen, {**config, "batch_size": 1, "max_steps": 3})
    assert [e.num_pairs for e in steps(one)] == [1, 1, 1]
    _, odd = await run(kitchen, {**config, "batch_size": 5, "dataset_size": 12})
    assert [e.num_pairs for e in steps(odd)] == [5, 5, 2]


async def test_gradient_accumulation_changes_nothing(kitchen: Kitchen, config: dict[str, Any]) -> None:
    _, whole = await run(kitchen, {**config, "batch_size": 8, "max_steps": 3})
    _, parts = await run(kitchen, {**config, "batch_size": 2, "gradient_accumulation": 4, "max_steps": 3})
    assert [e.loss for e in steps(parts)] == pytest.approx([e.loss for e in steps(whole)], rel=1e-9)


async def test_the_reference_scores_every_answer_once_whatever_the_epochs(
    kitchen: Kitchen, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    forward = NoopSession.forward

    async def counted(self: NoopSession, datums: Any) -> Any:
        scored.append(len(datums))
        return await forward(self, datums)

    monkeypatch.setattr(NoopSession, "forward", counted)
    result, _ = await run(kitchen, {**config, "epochs": 4, "holdout": 0})
    assert sum(scored) == 80
    assert [a.kind for a in result.artifacts].count("reference") == 1


async def test_a_loss_without_a_reference_scores_nothing(kitchen: Kitchen, config: dict[str, Any]) -> None:
    result, _ = await run(kitchen, {**config, "loss": "simpo", "max_steps": 1})
    assert "reference" not in [a.kind for a in result.artifacts]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"dpo_beta": 0}, "dpo_beta"),
        ({"dpo_beta": -0.1}, "dpo_beta"),
        ({"loss": "dpo"}, "loss"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no meaning for loss=ipo"),
        ({"simpo_gamma": 0.7}, "simpo_gamma has no meaning for loss=sigmoid"),
        ({"loss": "simpo", "reference": "other"}, "reference has no meaning for loss=simpo"),
        ({"loss": "orpo", "desirable_weight": 2.0}, "desirable_weight has no meaning"),
        ({"train_on": "all_tokens"}, "train_on"),
        ({"eval_max_tokens": 4}, "unknown config key 'eval_max_tokens'"),
    ],
)
async def test_a_key_that_would_do_nothing_is_refused(
    kitchen: Kitchen, config: dict[str, Any], keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        kitchen.check("preference", {**config, **keys})


async def test_a_backend_that_takes_no_losses_is_refused_before_the_run(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    client = NoopTrainingClient(capabilities={"custom_loss": "refused"})
    with pytest.raises(WorkflowError, match="takes no loss such as 'sigmoid'"):
        kitchen.check("preference", config, adapters={"training_client": client})


async def test_another_reference_is_a_model_of_its_own(kitchen: Kitchen, config: dict[str, Any]) -> None:
    opened: list[str] = []

    class Watched(NoopTrainingClient):
        def open_session(self, spec: Any) -> Any:
            opened.append(spec.model)
            return super().open_session(spec)

    _, events = await run(kitchen, {**config, "reference": "teacher", "max_steps": 1}, training_client=Watched())
    assert opened == ["noop", "teacher"]
    assert steps(events)[0].loss == pytest.approx(math.log(2), abs=1e-6), "the toy has one base model"


async def test_the_loss_and_the_metrics_are_those_of_the_formulas(kitchen: Kitchen, config: dict[str, Any]) -> None:
    result, events = await run(kitchen, {**config, "epochs": 2})
    last = steps(events)[-1]
    assert result.state.dpo_metrics["margin"] == pytest.approx(last.chosen_reward - last.rejected_reward)
    assert result.metrics["dpo.step.loss"] == last.loss
    assert np.isfinite(list(result.state.dpo_metrics.values())).all()
