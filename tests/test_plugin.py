"""A plug-in that is installed beside the package is found, checked and run like what ships with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The plug-in, really installed into a directory of its own; nothing is downloaded."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(PLUGIN)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def python(installed, code):
    """Run a program that sees the plug-in and return the JSON that it prints last."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_found_by_its_entry_points(installed):
    found = python(
        installed,
        """
import json, sys
from crucible_kitchen.registry import Registry
registry = Registry.discover()
names = [registry.adapter_names("evaluator"), sorted(registry.workflows)]
loaded = "majority_baseline" in sys.modules
print(json.dumps([*names, loaded, registry.adapter_class("evaluator", "strict").__name__]))
""",
    )
    evaluators, workflows, loaded, name = found
    assert "strict" in evaluators
    assert {"majority_baseline", "supervised"} <= set(workflows)
    assert not loaded, "discovery imports nothing"
    assert name == "StrictEvaluator"


def test_its_workflow_runs_with_its_adapter_and_its_stages(installed, tmp_path):
    rows = [{"prompt": str(i), "completion": "yes" if i % 4 else "no"} for i in range(400)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    result = python(
        installed,
        f"""
import json
from crucible_kitchen import run
config = {{"dataset": {str(data)!r}, "eval_size": 40}}
adapters = {{"evaluator": ("strict", {{"mistakes": 3}})}}
result = run("majority_baseline", config, adapters=adapters, home={str(tmp_path / "home")!r})
print(json.dumps([result.state.answer, dict(result.state.eval_results)]))
""",
    )
    answer, results = result
    assert answer == "yes"
    assert 10 <= results["n"] <= 40
    assert 0.3 < results["accuracy"] < 1.0


def test_it_keeps_the_contract_of_its_port(installed):
    count = python(
        installed,
        """
import anyio, json
from majority_baseline.evaluator import StrictEvaluator
from crucible_kitchen.testing import contracts
for check in contracts.EVALUATOR:
    anyio.run(check, contracts.EvaluatorCase(StrictEvaluator()))
print(json.dumps(len(contracts.EVALUATOR)))
""",
    )
    assert count > 10


def test_without_it_the_error_names_what_there_is():
    from crucible_kitchen.errors import AdapterError
    from crucible_kitchen.registry import Registry

    with pytest.raises(AdapterError, match="strict"):
        Registry.discover().adapter_class("evaluator", "strict")
