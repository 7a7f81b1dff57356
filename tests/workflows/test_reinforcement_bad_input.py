"""Environments and backends that misbehave, in whole runs: each is a typed outcome or one clear error."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen import events as e
from crucible_kitchen.errors import CapabilityError, EnvironmentFault
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.ports.environment import Action, Episode, Observation, Transition
from crucible_kitchen.rl import environments
from crucible_kitchen.types import Message
from crucible_kitchen.workers import ProcessPool
from crucible_kitchen_noop.sampler import NoopSampler

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {
    "model": "noop",
    "env": "odd",
    "advantage": "grpo",
    "group_size": 2,
    "groups_per_batch": 2,
    "num_rollouts": 2,
    "max_tokens": 3,
    "eval_size": 1,
}


class Member:
    """One episode of a kind that ``how`` names."""

    def __init__(self, source: "Odd", problem: int) -> None:
        self._source, self._problem = source, problem

    async def reset(self) -> Observation:
        how = self._source.how
        if how == "reset raises":
            raise RuntimeError("a row of data")
        if how == "reset hangs" and self._problem == 0:
            await anyio.sleep_forever()
        return Observation((Message("user", "x" * (1 << 20 if how == "long prompt" else 3)),))

    async def step(self, action: Action) -> Transition:
        how = self._source.how
        if how == "never ends":
            return Transition(0.25, terminated=False, observation=Observation((Message("tool", "go on"),)))
        reward: Any = 1.0
        if how == "reward hangs" and self._problem == 0:
            reward = await self._source.rewards.call("endless_reward:endless", action.text)
        if how == "no number":
            reward = float("nan")
        return Transition(reward, terminated=True)


class Group:
    """Members of one problem."""

    def __init__(self, source: "Odd", problem: int, size: int) -> None:
        self.environments = [Member(source, problem) for _ in range(size)]

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        return [0.0] * len(episodes)

    async def aclose(self) -> None:
        pass


class Odd:
    """Four problems; a user's reward runs in a worker process with a hard limit."""

    space, name = None, "odd"

    def __init__(self, task: str = "", *, how: str = "") -> None:
        self.how = how
        self.rewards = ProcessPool("rewards", size=2, timeout=0.3)

    def __len__(self) -> int:
        return 4

    async def fingerprint(self) -> str:
        return "odd"

    def held_out(self) -> None:
        return None

    async def open(self, problem: int, size: int, seed: int) -> Group:
        return Group(self, problem, size)

    async def aclose(self) -> None:
        await self.rewards.aclose()


@pytest.fixture(autouse=True)
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``env=odd`` known."""
    known = {**environments.environment_entries(), "odd": EntryPoint("odd", f"{__name__}:Odd", environments.GROUP)}
    monkeypatch.setattr(environments, "environment_entries", lambda: known)


async def run(home: Path, how: str, **values: Any) -> tuple[Any, list[e.Event]]:
    """Run to the end; return the result and all events."""
    config = {**SMALL, "env_options": {"how": how}, **values}
    async with Kitchen({"training_client": "noop"}, home=home) as kitchen:
        handle = await kitchen.start("reinforcement", config)
        events = [record.event async for record in handle.events()]
        return await handle.wait(), events


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("reset raises", "env_fault: RuntimeError"),
        ("no number", "env_fault: .* is no finite number"),
        ("long prompt", "env_fault: a prompt of 104857[0-9] tokens leaves no room in the context"),
    ],
)
async def test_where_every_episode_fails_the_run_ends_with_the_outcome_s_name(home: Path, how: str, says: str) -> None:
    with pytest.raises(EnvironmentFault, match=f"in a row came to nothing, the last because: {says}") as caught:
        await run(home, how)
    assert "a row of data" not in str(caught.value)


@pytest.mark.parametrize("how", ["reward hangs", "reset hangs"])
async def test_what_hangs_is_a_timeout_of_its_group_and_the_others_train(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / "endless_reward.py").write_text("def endless(answer):\n    while True:\n        pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {"rollout_timeout": 0.5} if how == "reset hangs" else {}
    result, events = await run(home, how, shuffle=False, **values)
    dropped = [event for event in events if isinstance(event, e.GroupDropped)]
    assert dropped
    assert {event.reason.partition(":")[0] for event in dropped} == {"timeout"}
    assert {event.index % 4 for event in dropped} == {0}
    assert result.status == "completed"
    assert [event.reward_mean for event in events if isinstance(event, e.RolloutComplete)] == [1.0, 1.0]


async def test_an_episode_that_never_ends_is_cut_and_trains_with_its_rewards_so_far(home: Path) -> None:
    result, events = await run(home, "never ends", max_turns=3)
    assert result.state.rollout_metrics["outcomes"] == {"truncated": 4}
    assert [event.reward_mean for event in events if isinstance(event, e.RolloutComplete)] == [0.75, 0.75]


@pytest.mark.parametrize("what", ["none", "not a number"])
async def test_a_backend_without_log_probabilities_ends_the_run_and_says_what_is_needed(
    home: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    sample = NoopSampler.sample

    async def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = await sample(self, *args, **kwargs)
        return [replace(one, logprobs=None if what == "none" else one.logprobs * float("nan")) for one in found]

    monkeypatch.setattr(NoopSampler, "sample", without)
    with pytest.raises(CapabilityError, match="gives no log-probabilities of what it sampled") as caught:
        await run(home, "")
    assert "sampler reports logprobs" in str(caught.value.hint)
