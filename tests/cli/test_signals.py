"""Signals, pipes and exit codes of the real program."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

pytestmark = pytest.mark.usefixtures("flows")

PROGRAM = Path(sys.executable).with_name("crucible-kitchen")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, home: Path) -> Iterator[Start]:
    """Starts the program; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def program(*arguments: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        environment = os.environ | {"CRUCIBLE_HOME": str(home)}
        process = subprocess.Popen(
            [PROGRAM, *arguments], cwd=tmp_path, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield program
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Read what the program tells until a word comes."""
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"the program ended without saying {word!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_run_which_ends_cancelled_everywhere(start: Start, number: signal.Signals) -> None:
    process = start("run", "flows.py:wait", "grace=0.5", "--json")
    wait_for(process, "simmering")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    ended = json.loads(out.splitlines()[-1])
    assert (ended["status"], ended["error"]["code"]) == ("cancelled", "run.cancelled")
    assert "Traceback" not in err
    shown, _ = start("show", ended["run_id"], "--json").communicate(timeout=20)
    assert json.loads(shown)["status"] == "cancelled"


def test_a_second_signal_ends_a_run_that_does_not_let_itself_be_cancelled(start: Start) -> None:
    process = start("run", "flows.py:stuck")
    wait_for(process, "simmering")
    process.send_signal(signal.SIGINT)
    wait_for(process, "once more ends it at once")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=0.3)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_error_to_speak_of(start: Start) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("events", "--schema", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=20)
    assert err == ""
    assert process.returncode not in (0, 2)


def test_the_program_says_its_version_and_helps_itself(start: Start) -> None:
    out, _ = start("--version").communicate(timeout=20)
    assert out.startswith("crucible-kitchen ")
    helped = start()
    _, err = helped.communicate(timeout=20)
    assert helped.returncode == 2
    assert "Commands:" in err
