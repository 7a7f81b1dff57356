"""The example cookbook, installed for real, brings its recipes to the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COOKBOOK = Path(__file__).parents[2] / "examples" / "cookbook"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The cookbook in a directory of its own; nothing is downloaded, and nothing written beside its sources."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(COOKBOOK)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def kitchen(installed, home, *arguments):
    """Run the command line with the cookbook; return its exit code, its last line and its errors."""
    environment = os.environ | {"PYTHONPATH": str(installed), "CRUCIBLE_HOME": str(home)}
    command = [str(Path(sys.executable).with_name("crucible-kitchen")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout.splitlines() or [""])[-1], done.stderr


def test_its_recipes_are_listed(installed, home):
    code, answer, errors = kitchen(installed, home, "recipes", "--json")
    assert code == 0, errors
    assert {"reverse_letters", "chat_lora"} <= {recipe["name"] for recipe in json.loads(answer)}


def test_a_recipe_runs_with_what_the_command_line_says_over_its_own(installed, home):
    small = ["dataset_size=64", "epochs=1", "eval_size=8", "--adapter", "training_client=noop"]
    code, answer, errors = kitchen(installed, home, "run", "reverse_letters", *small, "--quiet", "--json")
    assert code == 0, errors
    state = json.loads(answer)["state"]
    assert state["registered_model"]["name"] == "reverse_letters-tiny-reverse"
    assert state["eval_results"]["n"] == 8


def test_a_recipe_s_adapters_and_what_it_leaves_open_are_checked(installed, home):
    code, answer, errors = kitchen(installed, home, "run", "chat_lora", "model=any", "--dry-run", "--json")
    assert code == 0, errors
    assert "HuggingFace" in json.loads(answer)["manifest"]["adapters"]["dataset_store"]["class"]
    code, _, errors = kitchen(installed, home, "run", "chat_lora", "--dry-run")
    assert code == 2
    assert "'model' is missing" in errors
