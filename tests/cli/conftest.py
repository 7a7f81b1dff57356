"""The command line in this process, and workflows to give it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.cli import main

FLOWS = '''
"""Workflows of a user's own."""

from typing import Any

import anyio

from crucible_kitchen import Recipe, Run, RunConfig, Workflow, stage


class PotConfig(RunConfig):
    size: int = 1
    names: tuple[str, ...] = ()
    options: dict[str, str] = {}
    note: str | None = "salt"


@stage(writes="answer")
async def answer(config: PotConfig) -> dict[str, Any]:
    """Write what the config says."""
    return config.model_dump(include={"size", "names", "options", "note"}, mode="json")


@stage()
async def boil_over(answer: dict[str, Any]) -> None:
    """Fail."""
    raise RuntimeError("the stove is cold")


@stage()
async def simmer(run: Run) -> None:
    """Wait until somebody cancels."""
    run.warn("simmering", "simmering")
    await anyio.sleep_forever()


@stage()
async def burn(run: Run) -> None:
    """Wait, whoever cancels."""
    run.warn("simmering", "simmering")
    with anyio.CancelScope(shield=True):
        await anyio.sleep_forever()


cook = Workflow("cook", answer, config=PotConfig, description="Cooks")
dinner = Recipe("dinner", cook, {"size": 4}, description="For four")
spoil = Workflow("spoil", answer, boil_over, config=PotConfig)
wait = Workflow("wait", simmer)
stuck = Workflow("stuck", burn)
unwritten = Workflow("unwritten", boil_over)
a_number = 3
'''


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output, as JSON."""
        return json.loads(self.out.splitlines()[-1])


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process, in a directory and with a home of the test's own."""
    monkeypatch.setenv("CRUCIBLE_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def flows(tmp_path: Path) -> Path:
    """A file with workflows, in the directory where commands run."""
    path = tmp_path / "flows.py"
    path.write_text(FLOWS, encoding="utf-8")
    return path
