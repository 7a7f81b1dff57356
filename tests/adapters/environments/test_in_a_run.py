"""Environments in whole runs: what they reward is learned from, what breaks is counted and never a reward."""

import json
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen import Kitchen
from crucible_kitchen.errors import CrucibleError, DatasetNotFound, SandboxUnavailable
from crucible_kitchen.events import RolloutComplete
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
async def test_a_run_on_programs_judges_them(home: Path, namespaces: None) -> None:
    result = await Kitchen(home=home).run("reinforcement", {**SMALL, "env": f"deepcoder:{one_program(home)}"})
    assert result.status == "completed"
    assert result.state.rollout_metrics["outcomes"] == {"scored": 4}


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
async def test_a_run_on_programs_refuses_to_start_without_isolation(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "_JAIL", "refusing_jail:run")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    with pytest.raises(SandboxUnavailable) as caught:
        await Kitchen(home=home).run("reinforcement", {**SMALL, "env": f"deepcoder:{one_program(home)}"})
    assert "limits-only" in str(caught.value.hint)


def one_program(home: Path) -> Path:
    """Write a file of one problem."""
    file = home / "problems.jsonl"
    tests = json.dumps({"inputs": [""], "outputs": ["1\n"]})
    file.write_text(json.dumps({"problem": "Print 1.", "tests": tests}) + "\n")
    return file


async def test_problems_that_are_not_there_end_the_run_with_their_name(home: Path) -> None:
    with pytest.raises(DatasetNotFound, match=r"none\.jsonl"):
        await Kitchen(home=home).run("reinforcement", {**SMALL, "env": "math:none.jsonl"})


GOES_ON: dict[str, Any] = {
    "model": "mlp",
    "lora_rank": 0,
    "env": "gymnasium:CartPole-v1",
    "group_size": 3,
    "groups_per_batch": 1,
    "horizon": 20,
    "num_rollouts": 4,
    "ppo_epochs": 2,
    "minibatches": 2,
    "eval_size": 2,
}


@pytest.mark.parametrize("isolation", ["none", "process"])
async def test_an_environment_goes_on_from_update_to_update(home: Path, isolation: str) -> None:
    pytest.importorskip("gymnasium")
    async with Kitchen(home=home) as kitchen:
        run = await kitchen.start("reinforcement", {**GOES_ON, "env_options": {"isolation": isolation}})
        rolled = [r.event async for r in run.events() if isinstance(r.event, RolloutComplete)]
        await run.wait()
    assert [event.num_trajectories * event.tokens_mean for event in rolled] == pytest.approx([60] * 4)
    assert all(event.num_trajectories - event.num_ended <= 3 for event in rolled)
    assert sum(event.num_ended for event in rolled) > 3
    assert max(event.reward_mean for event in rolled[1:]) > 20  # episodes are longer than a segment


@pytest.mark.parametrize(
    ("change", "says"),
    [({"advantage": "grpo"}, "advantage=gae"), ({"model": "tiny", "env": "sums"}, "model=mlp")],
)
async def test_what_cannot_go_on_is_refused(home: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(CrucibleError) as caught:
        await Kitchen(home=home).run("reinforcement", {**GOES_ON, **change})
    assert says in str(caught.value)


@pytest.mark.parametrize("how", ["reset raises", "hangs", "nan", "shape", "infinite reward"])
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
