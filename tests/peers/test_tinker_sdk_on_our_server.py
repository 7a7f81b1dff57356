"""The real `tinker` SDK, in a virtual environment of its own, works with the training server."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from crucible_kitchen.testing.training_server import RunningServer

pytestmark = pytest.mark.peers

PYTHON = Path(__file__).parents[2] / ".peers" / "tinker-sdk" / "bin" / "python"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    if not PYTHON.exists():
        pytest.skip("`make peers` installs the SDK")
    with RunningServer("tiny", tmp_path_factory.mktemp("server"), "tml-a-key", threads=1) as server:
        script = Path(__file__).with_name("tinker_client.py")
        environment = os.environ | {"TINKER_TELEMETRY": "0"}
        ran = subprocess.run(
            [PYTHON, script, server.url], capture_output=True, text=True, timeout=300, env=environment, check=False
        )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_it_creates_a_model_and_trains_it(seen):
    assert seen["sdk"] == "0.23.4"
    assert seen["info"] == ["tiny", True, 4]
    assert seen["losses"] == sorted(seen["losses"], reverse=True)
    assert seen["losses"][-1] < 0.1 * seen["losses"][0]


def test_it_saves_a_state_and_loads_it_here_and_in_another_model(seen):
    path, kept, moved, loaded = seen["state"]
    assert path.startswith("tinker://")
    assert moved < kept == loaded == seen["elsewhere"]


def test_it_samples_from_published_weights_and_from_the_base_model(seen):
    published, base = seen["samples"]
    assert bytes(published[0]).startswith(b"46\n"), "greedy samples of the trained weights say what they were taught"
    assert published[0] == published[1] != base[0]
    first, total = seen["scores"]
    assert first is None
    assert total == pytest.approx(seen["state"][1], abs=1e-4)


def test_it_learns_what_it_did_wrong(seen):
    category, message = seen["refused"]
    assert category == "user"
    assert "outside the vocabulary" in message
