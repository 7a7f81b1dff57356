"""What a newcomer sees first: ``make demo`` teaches the built-in model a task, measures it and registers it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

BUDGET_SECONDS = 120


def test_the_demo_learns_sums_that_it_never_saw(demo_run: Any) -> None:
    before, after = demo_run["state"]["eval_before"], demo_run["state"]["eval_results"]
    assert demo_run["status"] == "completed"
    assert before["n"] == after["n"] >= 200
    assert before["accuracy"] < 0.2
    assert after["accuracy"] > 0.9
    low, high = after["intervals"]["accuracy"]
    assert low <= after["accuracy"] <= high
    assert not after["synthetic"]


def test_the_demo_names_the_model_that_it_registered_and_its_lineage(
    command: Any, demo_run: Any, demo_home: Path
) -> None:
    model = demo_run["state"]["registered_model"]
    assert (model["name"], model["version"]) == ("sums-tiny", 1)
    rows = command("models", "--json", home=demo_home).json
    assert ("sums-tiny", 1) in [(row["name"], row["version"]) for row in rows]
    lineage = model["lineage"]
    assert lineage["run"] == demo_run["run_id"]
    assert lineage["recipe"] == "sums_demo"
    assert len(lineage["dataset_fingerprint"]) == len(lineage["config_hash"]) == 64
    assert lineage["versions"]["torch"]


def test_a_person_reads_what_happened(demo: Any, demo_run: Any, demo_home: Path) -> None:
    facts = {line.split()[0]: line for line in demo.out.splitlines()}
    before, after = demo_run["state"]["eval_before"]["accuracy"], demo_run["state"]["eval_results"]["accuracy"]
    assert f"{before:.3f} before, {after:.3f} after" in facts["accuracy"]
    assert facts["model"].split()[-1] == "sums-tiny:1"
    assert (Path(facts["weights"].split()[-1]) / "model.safetensors").is_file()
    assert Path(facts["report"].split()[-1]).is_file()
    assert "ETA" in demo.err
    assert "Traceback" not in demo.err
    assert str(demo_home) in facts["look"]


def test_how_long_it_took_is_told(demo_run: Any, demo_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.loads(line) for line in (demo_home / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {"train_step": 0.0, "evaluate_before": 0.0, "evaluate": 0.0, "register_model": 0.0}
    for record in records:
        if record["event"] == "stage.stop" and record["stage"] in seconds:
            seconds[record["stage"]] += record["duration_s"]
    taken = sum(seconds.values())
    told = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    with capsys.disabled():
        print(f"\ndemo: {told}; together {taken:.1f} s, of {BUDGET_SECONDS} s on two idle cores", file=sys.stderr)
    assert 0 < taken <= demo_run["duration_s"]
