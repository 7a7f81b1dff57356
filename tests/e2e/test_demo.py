"""What a newcomer sees first: ``make demo`` teaches the built-in model a task, measures it and registers it."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

MAKEFILE = Path(__file__).parents[2] / "Makefile"
BUDGET_SECONDS = 120


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which nothing ever ran."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(command: Any, demo_home: Path) -> Any:
    """The demo's command, run to its end."""
    (line,) = (line for line in MAKEFILE.read_text(encoding="utf-8").splitlines() if "run sums_demo" in line)
    arguments = line.partition("crucible-kitchen ")[2].split()
    ended = command(*arguments, "--jsonl=events.jsonl", home=demo_home)
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def shown(command: Any, demo: Any, demo_home: Path) -> Any:
    """What the run gave, as JSON."""
    return command("show", demo.out.split()[1], "--json", home=demo_home).json


def test_the_demo_learns_sums_that_it_never_saw(shown: Any) -> None:
    before, after = shown["state"]["eval_before"], shown["state"]["eval_results"]
    assert shown["status"] == "completed"
    assert before["n"] == after["n"] >= 200
    assert before["accuracy"] < 0.2
    assert after["accuracy"] > 0.9
    low, high = after["intervals"]["accuracy"]
    assert low <= after["accuracy"] <= high
    assert not after["synthetic"]


def test_the_demo_names_the_model_that_it_registered_and_its_lineage(command: Any, shown: Any, demo_home: Path) -> None:
    model = shown["state"]["registered_model"]
    assert (model["name"], model["version"]) == ("sums-tiny", 1)
    (row,) = command("models", "--json", home=demo_home).json
    assert (row["name"], row["version"]) == ("sums-tiny", 1)
    lineage = model["lineage"]
    assert lineage["run"] == shown["run_id"]
    assert lineage["recipe"] == "sums_demo"
    assert len(lineage["dataset_fingerprint"]) == len(lineage["config_hash"]) == 64
    assert lineage["versions"]["torch"]


def test_a_person_reads_what_happened(demo: Any, shown: Any, demo_home: Path) -> None:
    facts = {line.split()[0]: line for line in demo.out.splitlines()}
    before, after = shown["state"]["eval_before"]["accuracy"], shown["state"]["eval_results"]["accuracy"]
    assert f"{before:.3f} before, {after:.3f} after" in facts["accuracy"]
    assert facts["model"].split()[-1] == "sums-tiny:1"
    assert (Path(facts["weights"].split()[-1]) / "model.safetensors").is_file()
    assert Path(facts["report"].split()[-1]).is_file()
    assert "ETA" in demo.err
    assert "Traceback" not in demo.err
    assert str(demo_home) in facts["look"]


def test_how_long_it_took_is_told(shown: Any, demo_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.loads(line) for line in (demo_home / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {"train_step": 0.0, "evaluate_before": 0.0, "evaluate": 0.0, "register_model": 0.0}
    for record in records:
        if record["event"] == "stage.stop" and record["stage"] in seconds:
            seconds[record["stage"]] += record["duration_s"]
    taken = sum(seconds.values())
    told = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    with capsys.disabled():
        print(f"\ndemo: {told}; together {taken:.1f} s, of {BUDGET_SECONDS} s on two idle cores")
    assert 0 < taken <= shown["duration_s"]
