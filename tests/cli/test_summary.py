"""What a person reads of a run."""

from pathlib import Path
from typing import Any

from crucible_kitchen.cli.options import DEFAULT_HOME
from crucible_kitchen.cli.summary import accuracy, summary

RESULTS: dict[str, Any] = {"accuracy": 0.97, "n": 200, "intervals": {"accuracy": [0.94, 0.99]}, "synthetic": False}


def test_an_accuracy_stands_with_its_interval_and_number_of_rows() -> None:
    assert accuracy(RESULTS, None) == "0.970 (95% interval 0.940 to 0.990, 200 held-out rows)"
    assert accuracy(RESULTS, {"accuracy": 0.02}).startswith("0.020 before, 0.970 after (95% interval")


def test_made_up_numbers_are_called_synthetic() -> None:
    assert "synthetic" in accuracy(RESULTS | {"synthetic": True}, None)


def test_a_run_that_measured_nothing_says_no_accuracy() -> None:
    facts = {"run_id": "r1", "status": "failed", "state": {}, "duration_s": None}
    assert summary(facts, DEFAULT_HOME) == ["run r1 failed", "  look again  crucible-kitchen show r1"]


def test_another_home_is_part_of_the_line_to_look_again() -> None:
    facts = {"run_id": "r1", "status": "completed", "state": {"eval_results": RESULTS}, "duration_s": 2.0}
    lines = summary(facts, Path("/else/where"))
    assert lines[0] == "run r1 completed after 2.0 s"
    assert lines[-1] == "  look again  crucible-kitchen show r1 --home /else/where"
