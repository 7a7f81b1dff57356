"""Environments of the package verifiers, played by it and rolled out here."""

import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crucible_kitchen import Kitchen
from crucible_kitchen.errors import ConfigError, CrucibleError, EnvironmentFault, EnvironmentTimeout
from crucible_kitchen.events import RolloutComplete
from crucible_kitchen.ports.environment import Action
from crucible_kitchen.workers import run_sync
from crucible_kitchen_environments.verifiers import VerifiersEnvironments

pytest.importorskip("verifiers", reason="`make peers` installs verifiers")

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

SMALL: dict[str, Any] = {
    "model": "tiny",
    "advantage": "grpo",
    "group_size": 2,
    "groups_per_batch": 2,
    "num_rollouts": 1,
    "max_tokens": 4,
    "eval_size": 2,
}


@pytest.fixture(autouse=True)
def tasksets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tasksets beside this file importable, as if they were installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "tasksets"))


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., VerifiersEnvironments]]:
    """Sources that are closed at the end."""
    sources: list[VerifiersEnvironments] = []

    def open_source(task: str, **options: str) -> VerifiersEnvironments:
        sources.append(VerifiersEnvironments(task, **{"workers": "1", **options}))
        return sources[-1]

    yield open_source
    for source in sources:
        await source.aclose()


def action(text: str, *, complete: bool = True) -> Action:
    return Action(text, np.zeros(1, dtype=np.int64), complete)


async def test_single_turns_are_scored_with_their_weights_and_members_do_not_mix(opened: Any) -> None:
    group = await opened("one_question", count="3").open(1, 2, 0)
    right, wrong = group.environments
    told = await right.reset()
    assert [(m.role, m.content) for m in told.messages] == [
        ("system", "Answer with a number."),
        ("user", "What is 1+1?"),
    ]
    await wrong.reset()
    lost = await wrong.step(action("4"))
    won = await right.step(action("2"))
    assert (won.reward, won.terminated, won.metrics) == (2.0, True, {"right": 1.0, "strange": 0.0, "length": 1.0})
    assert (lost.reward, lost.terminated) == (0.0, True)
    assert list(await group.group_rewards([])) == []
    await group.aclose()


async def test_an_answer_that_was_cut_ends_a_cut_episode(opened: Any) -> None:
    group = await opened("one_question").open(0, 1, 0)
    (member,) = group.environments
    await member.reset()
    cut = await member.step(action("0", complete=False))
    assert (cut.terminated, cut.truncated) == (False, True)
    await group.aclose()


async def test_further_turns_tell_only_what_is_new_and_the_environment_ends_them(opened: Any) -> None:
    source = opened("twenty-questions")
    await source.fingerprint()
    number = source._places[4]
    group = await source.open(4, 1, 0)
    (member,) = group.environments
    assert (await member.reset()).messages[-1].content == "A number from 0 to 9:"
    first = await member.step(action("x"))
    assert first.observation is not None
    assert [(m.role, m.content) for m in first.observation.messages] == [("user", "lower:")]
    last = await member.step(action(str(number)))
    assert (last.reward, last.terminated, last.metrics) == (1.0, True, {"found": 1.0, "turns": 2.0})
    await group.aclose()


async def test_a_tool_is_described_called_and_its_answer_told(opened: Any) -> None:
    group = await opened("with_a_tool").open(0, 1, 0)
    (member,) = group.environments
    opening = (await member.reset()).messages
    assert "open_safe" in opening[0].content
    unknown = await member.step(action('<tool_call>{"name": "shout", "arguments": {}}</tool_call>'))
    assert unknown.observation is not None
    assert "no tool 'shout'" in unknown.observation.messages[0].content
    called = await member.step(action('So: <tool_call>{"name": "open_safe", "arguments": {"code": 7}}</tool_call>'))
    assert called.observation is not None
    assert [(m.role, m.content) for m in called.observation.messages] == [("tool", "gold7")]
    told = await member.step(action("gold7"))
    assert (told.reward, told.terminated, told.metrics["calls"]) == (1.0, True, 2.0)
    await group.aclose()


async def test_a_reward_that_raises_is_a_fault_and_quotes_no_data(opened: Any) -> None:
    group = await opened("one_question", how="raises").open(0, 1, 0)
    (member,) = group.environments
    await member.reset()
    with pytest.raises(EnvironmentFault, match="TaskError") as caught:
        await member.step(action("0"))
    assert "a row of data" not in str(caught.value)
    await group.aclose()


async def test_a_reward_that_hangs_is_killed_and_the_other_members_are_told(opened: Any) -> None:
    group = await opened("one_question", how="hangs", timeout="10").open(0, 2, 0)
    hanging, other = group.environments
    await hanging.reset()
    await other.reset()
    with pytest.raises(EnvironmentTimeout):
        await hanging.step(action("0"))
    with pytest.raises(EnvironmentFault, match="another member"):
        await other.step(action("0"))
    await group.aclose()


async def test_a_twentieth_of_the_tasks_is_held_out(opened: Any) -> None:
    source = opened("one_question", count="400", problems="200")
    train = await run_sync(lambda: len(source))
    held = await run_sync(source.held_out)
    assert held is not None
    assert train + len(held) == 200
    assert 3 <= len(held) <= 25
    assert held.held_out() is None
    assert await held.fingerprint() != await source.fingerprint()
    with pytest.raises(IndexError):
        await source.open(train, 1, 0)


async def test_what_cannot_be_rolled_out_is_refused_with_the_reason(opened: Any) -> None:
    with pytest.raises(ConfigError, match="no module 'there_is_none'"):
        opened("there-is-none")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        await run_sync(lambda: len(opened("one_question", no_such="1")))


async def test_a_run_trains_on_what_the_package_rewards(home: Path) -> None:
    config = {**SMALL, "env": "verifiers:one_question", "env_options": {"workers": "1", "count": "30"}}
    result = await Kitchen(home=home).run("reinforcement", config)
    assert result.status == "completed"
    assert sum(result.state.rollout_metrics["outcomes"].values()) == 4
    assert set(result.state.rollout_metrics["outcomes"]) <= {"scored", "truncated"}
    assert result.state.rollout_metrics["metrics"].keys() >= {"right", "length"}


@pytest.mark.parametrize("how", ["raises", "nan"])
async def test_a_run_whose_every_reward_fails_ends_and_none_was_0(home: Path, how: str) -> None:
    config = {**SMALL, "env": "verifiers:one_question", "env_options": {"workers": "1", "how": how}}
    async with Kitchen(home=home) as kitchen:
        run = await kitchen.start("reinforcement", config)
        events = [record.event async for record in run.events()]
        with pytest.raises(CrucibleError):
            await run.wait()
    assert not [event for event in events if isinstance(event, RolloutComplete)]


async def test_nothing_of_an_episode_that_was_killed_stays(
    opened: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = set(os.listdir(tempfile.gettempdir()))
    source = opened("one_question", how="hangs", timeout="5")
    group = await source.open(0, 1, 0)
    await group.environments[0].reset()
    with pytest.raises(EnvironmentTimeout):
        await group.environments[0].step(action("0"))
    await group.aclose()
    await source.aclose()
    assert set(os.listdir(tempfile.gettempdir())) <= before
    assert not await run_sync(lambda: list(tmp_path.glob(".cache/**/subprocess/*")))
