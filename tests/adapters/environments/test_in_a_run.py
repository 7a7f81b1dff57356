"""Environments in whole runs: what they reward is learned from, what breaks is counted and never a reward."""

import json
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen import Kitchen
from crucible_kitchen.errors import CrucibleError, DatasetNotFound, SandboxUnavailable
from crucible_kitchen_environments import sandbox as sandbox_module

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {
    "model": "tiny",
    "advantage": "grpo",
    "group_size": 2,
    "groups_per_batch": 2,
    "num_rollouts": 1,
    "max_tokens": 4,
    "eval_size": 2,
}


async def test_a_run_with_a_tool_plays_several_turns_and_ends(home: Path) -> None:
    result = await Kitchen(home=home).run("reinforcement", {**SMALL, "env": "calculator"})
    assert result.status == "completed"
    assert result.state.rollout_metrics["metrics"].keys() == {"calls", "correct"}
    assert set(result.state.rollout_metrics["outcomes"]) <= {"scored", "truncated"}


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
async def test_a_run_on_programs_judges_them_or_refuses_to_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "problems.jsonl"
    tests = json.dumps({"inputs": [""], "outputs": ["1\n"]})
    file.write_text(json.dumps({"problem": "Print 1.", "tests": tests}) + "\n")
    config = {**SMALL, "env": f"deepcoder:{file}"}
    result = await Kitchen(home=home).run("reinforcement", config)
    assert result.status == "completed"
    assert result.state.rollout_metrics["outcomes"] == {"scored": 4}
    monkeypatch.setattr(sandbox_module, "_JAIL", "refusing_jail:run")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    with pytest.raises(SandboxUnavailable) as caught:
        await Kitchen(home=home).run("reinforcement", config)
    assert "limits-only" in str(caught.value.hint)


async def test_problems_that_are_not_there_end_the_run_with_their_name(home: Path) -> None:
    with pytest.raises(DatasetNotFound, match=r"none\.jsonl"):
        await Kitchen(home=home).run("reinforcement", {**SMALL, "env": "math:none.jsonl"})


@pytest.mark.parametrize("how", ["reset raises", "hangs", "nan"])
async def test_a_run_whose_every_environment_breaks_ends_with_one_clear_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    config = {
        **SMALL,
        "model": "mlp",
        "lora_rank": 0,
        "env": "gymnasium:strange_gyms:Strange-v0",
        "env_options": {"how": how, "step_timeout": "0.3", "problems": "3", "workers": "2"},
    }
    with anyio.fail_after(120), pytest.raises(CrucibleError) as caught:
        await Kitchen(home=home).run("reinforcement", config)
    assert caught.value.where is not None
    assert "a row of data" not in str(caught.value)
