"""``compare``: config, metrics, artifacts, and where the losses of two runs begin to differ."""

from typing import Any

import pytest

from crucible_kitchen.cli.comparing import Seen, comparison

NOOP = (
    "supervised", "model=any", "dataset=sums", "dataset_size=64", "batch_size=16", "eval_size=8",
    "--adapter", "training_client=noop", "--json",
)  # fmt: skip


def test_two_runs_of_one_config_are_the_same_step_by_step(cli: Any) -> None:
    first, second = (cli("run", *NOOP).json["run_id"] for _ in range(2))
    found = cli("compare", first, second, "--json").json
    assert found["same_config"]
    assert found["same_steps"]
    assert found["same_weights"]
    assert found["steps"]["training.step.loss"] == {"same": True, "differs_at": None, "values": None, "steps": [4, 4]}
    told = cli("compare", first, second).out
    assert "training.step.loss the same at all 4 steps" in told
    assert "the same, bit for bit" in told


def test_two_seeds_differ_from_a_step_on_and_in_the_config_by_name(cli: Any) -> None:
    first = cli("run", *NOOP).json["run_id"]
    second = cli("run", *NOOP[:-3], "seed=1", *NOOP[-3:]).json["run_id"]
    found = cli("compare", first, second, "--json").json
    assert found["config"] == {"seed": [0, 1]}
    course = found["steps"]["training.step.loss"]
    assert course["differs_at"] is not None
    assert course["values"][0] != course["values"][1]
    told = cli("compare", first, second).out
    assert f"differs from step {course['differs_at']} on" in told
    assert "config  differs in seed" in told


def test_an_unknown_run_exits_2(cli: Any) -> None:
    assert cli("compare", "a", "b").code == 2


def seen(steps: dict[int, float], **values: Any) -> Seen:
    given = {"config": {}, "metrics": {}, "manifest": {}, "artifacts": []} | values
    return Seen("r", "completed", steps={"training.step.loss": steps}, **given)


@pytest.mark.parametrize(
    ("a", "b", "at", "same"),
    [
        ({1: 0.5, 2: 0.25}, {1: 0.5, 2: 0.25}, None, True),
        ({1: 0.5, 2: 0.25}, {1: 0.5}, None, False),
        ({1: 0.5, 2: 0.25, 3: 1.0}, {1: 0.5, 2: 0.26, 3: 1.0}, 2, False),
        ({1: float("nan")}, {1: float("nan")}, None, True),
    ],
)
def test_losses_are_the_same_up_to_the_first_step_at_which_a_bit_differs(a: Any, b: Any, at: Any, same: bool) -> None:
    course = comparison(seen(a), seen(b))["steps"]["training.step.loss"]
    assert course["differs_at"] == at
    assert course["same"] is same


def test_an_artifact_that_only_one_run_made_is_told() -> None:
    made = [{"kind": "weights", "name": "export", "sha256": "ab"}]
    facts = comparison(seen({}, artifacts=made), seen({}))
    assert facts["artifacts"] == [{"kind": "weights", "name": "export", "sha256": ["ab", None], "same": False}]
    assert facts["same_weights"] is False
