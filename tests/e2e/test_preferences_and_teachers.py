"""What preference learning and distillation are for: a small model from random weights really learns by them."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

TINY = ("model=tiny", "dataset=sums")


@pytest.fixture
def run(command: Any) -> Any:
    """Runs a workflow to its end and gives what it made, as JSON."""

    def call(*arguments: object, home: Path) -> Any:
        ended = command("run", *arguments, "--json", home=home)
        assert ended.code == 0, ended.err
        return ended.json

    return call


def test_comparing_right_and_wrong_sums_teaches_which_is_right(run: Any, home: Path) -> None:
    keys = ("loss=orpo", "dpo_beta=0.5", "epochs=4", "warmup=0.05", "eval_at_start=true")
    found = run("preference", *TINY, *keys, home=home)
    before, after = found["state"]["eval_before"], found["state"]["eval_results"]
    assert 0.35 < before["ranking_accuracy"] < 0.65
    assert after["ranking_accuracy"] > 0.95
    assert after["accuracy"] > 0.95
    low, high = after["intervals"]["accuracy"]
    assert low <= after["accuracy"] <= high
    report = home / "runs" / found["run_id"] / "report.md"
    assert "ranking\\_accuracy" in report.read_text(encoding="utf-8")


def test_a_student_reaches_its_teacher_in_fewer_steps_than_the_references_need(
    run: Any, demo_run: Any, demo_home: Path
) -> None:
    """The demo takes 846 steps of 64 references for its teacher; the student 705, of as many prompts it answers."""
    keys = ("method=gjsd", "gjsd_beta=0", "samples_per_prompt=2", "sample_max_tokens=5", "eval_max_tokens=8")
    rate = ("epochs=5", "learning_rate=3e-3", "warmup=0.05", "seed=1")
    found = run("distillation", *TINY, "teacher=sums-tiny:1", *keys, *rate, home=demo_home)
    teacher, student = found["state"]["teacher_results"], found["state"]["eval_results"]
    assert found["state"]["step"]["step"] < demo_run["state"]["step"]["step"]
    assert student["accuracy"] >= teacher["accuracy"] - 0.02
