"""What preference learning and distillation are for: a small model from random weights really learns by them."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

TINY = ("model=tiny", "dataset=sums")


@pytest.fixture(scope="module")
def shown(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a workflow to its end and gives what it made, as JSON, and where it was made."""
    home = tmp_path_factory.mktemp("learning")

    def call(*arguments: object) -> Any:
        ended = command("run", *arguments, "--json", home=home)
        assert ended.code == 0, ended.err
        return ended.json | {"home": home}

    return call


def test_comparing_right_and_wrong_sums_teaches_which_is_right(shown: Any) -> None:
    keys = ("loss=orpo", "dpo_beta=0.5", "epochs=4", "warmup=0.05", "eval_at_start=true")
    found = shown("preference", *TINY, *keys)
    before, after = found["state"]["eval_before"], found["state"]["eval_results"]
    assert 0.35 < before["ranking_accuracy"] < 0.65
    assert after["ranking_accuracy"] > 0.95
    assert after["accuracy"] > 0.95
    low, high = after["intervals"]["accuracy"]
    assert low <= after["accuracy"] <= high
    report = Path(found["home"], "runs", found["run_id"], "report.md")
    assert "ranking\\_accuracy" in report.read_text(encoding="utf-8")


def test_a_reward_model_tells_right_from_wrong_sums(shown: Any) -> None:
    found = shown("reward_model", *TINY, "epochs=6", "warmup=0.05", "eval_at_start=true")
    assert found["state"]["eval_before"]["accuracy"] < 0.65
    assert found["state"]["eval_results"]["accuracy"] > 0.75
