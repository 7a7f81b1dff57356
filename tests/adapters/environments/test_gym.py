"""Gymnasium's environments: what an episode is, and what a broken one becomes."""

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.errors import ConfigError, EnvironmentFailure, EnvironmentFault, EnvironmentTimeout
from crucible_kitchen.rl.rollout import Roller, RolloutRules
from crucible_kitchen.rl.trajectories import EnvFault, Ticket, Timeout, Truncated
from crucible_kitchen_environments.gym import GymnasiumEnvironments

gymnasium = pytest.importorskip("gymnasium")
pytestmark = pytest.mark.anyio
FIRST = np.zeros(1, np.int64)


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., GymnasiumEnvironments]]:
    sources: list[GymnasiumEnvironments] = []

    def make(task: str, **options: str) -> GymnasiumEnvironments:
        sources.append(GymnasiumEnvironments(task, workers="1", **options))
        return sources[-1]

    yield make
    for source in sources:
        await source.aclose()


@pytest.mark.parametrize("isolation", ["process", "none"])
async def test_copies_go_through_the_same_states_as_the_environment_itself(
    opened: Callable[..., GymnasiumEnvironments], isolation: str
) -> None:
    source = opened("CartPole-v1", isolation=isolation)
    assert (source.space.features, source.space.actions) == (4, 2)
    group = await source.open(7, 3, seed=11)
    first = await group.reset(np.array([0, 0, 4]))
    seeds = [int(np.random.SeedSequence((11, 7, *key)).generate_state(1)[0]) for key in [(0, 0), (1, 0), (2, 4)]]
    envs = [gymnasium.make("CartPole-v1") for _ in range(3)]
    assert np.array_equal(first, [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    over = np.zeros(3, dtype=bool)
    for step in range(200):
        actions = np.where(over, -1, [1, 0, step % 2])
        moved = await group.step(actions)
        for i in np.flatnonzero(~over):
            observed, reward, terminated, truncated, _ = envs[i].step(int(actions[i]))
            assert np.array_equal(moved.observations[i], observed)
            assert (moved.rewards[i], moved.terminated[i], moved.truncated[i]) == (reward, terminated, truncated)
            over[i] = terminated or truncated
        if over.all():
            break
    assert over[:2].all()
    await group.aclose()


async def test_equal_seeds_are_equal_episodes_and_held_out_ones_are_others(
    opened: Callable[..., GymnasiumEnvironments],
) -> None:
    source = opened("CartPole-v1", problems="10")
    held = source.held_out()
    assert held is not None
    seen = []
    for where, problem, seed in [(source, 0, 1), (source, 0, 1), (source, 1, 1), (source, 0, 2), (held, 0, 1)]:
        group = await where.open(problem, 2, seed)
        seen.append((await group.reset(np.zeros(2, np.int64))).tobytes())
        await group.aclose()
    await held.aclose()
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4
    assert held.held_out() is None
    assert await held.fingerprint() != await source.fingerprint()


@pytest.mark.parametrize(
    ("how", "terminated", "truncated"), [("", True, False), ("cut", False, True), ("both", True, False)]
)
async def test_an_episode_that_was_cut_is_not_one_that_ended(
    opened: Callable[..., GymnasiumEnvironments], how: str, terminated: bool, truncated: bool
) -> None:
    source = opened("strange_gyms:Strange-v0", how=how)
    group = await source.open(0, 1, 0)
    await group.reset(FIRST)
    await group.step(np.array([0]))
    last = await group.step(np.array([1]))
    assert (last.terminated[0], last.truncated[0]) == (terminated, truncated)
    assert last.observations[0].tolist() == [2, 2, 2]
    after = await group.step(np.array([-1]))  # nothing moves, nothing is reset
    assert after.observations[0].tolist() == [2, 2, 2]
    assert after.rewards[0] == 0
    await group.aclose()


class Actor:
    """A policy that always takes action 0."""

    async def act(self, observations: np.ndarray, uniforms: np.ndarray) -> Any:
        size = len(observations)
        return SimpleNamespace(actions=np.zeros(size, dtype=np.int64), logprobs=np.zeros(size, dtype=np.float32))

    @contextmanager
    def _use(self) -> Iterator[tuple[Any, int]]:
        yield self, 0

    def current(self) -> AbstractContextManager[tuple[Any, int]]:
        return self._use()


@pytest.mark.parametrize(
    ("how", "outcome", "says"),
    [
        ("reset raises", EnvFault, "reset of gymnasium:strange_gyms:Strange-v0 raised RuntimeError"),
        ("dies", EnvFault, "ended its process"),
        ("nan", EnvFault, "not finite"),
        ("infinite reward", EnvFault, "not finite"),
        ("hangs", Timeout, "took too long and was killed"),
        ("never ends", Truncated, ""),
    ],
)
async def test_a_broken_environment_becomes_a_typed_outcome_and_never_a_reward(
    opened: Callable[..., GymnasiumEnvironments], how: str, outcome: type, says: str
) -> None:
    source = opened("strange_gyms:Strange-v0", how=how, step_timeout="0.5" if how == "hangs" else "30")
    roll = Roller(source, Actor(), RolloutRules(group_size=2, max_turns=5, attempts=1))  # type: ignore[arg-type]
    group = await roll(Ticket(0, 0))
    assert [type(o) for o in group.outcomes] == [outcome, outcome]
    assert says in str(getattr(group.outcomes[0], "reason", ""))
    assert "a row of data" not in str(group.outcomes[0])
    # And the only worker is free again.
    assert source._pool is not None
    assert source._pool.busy == 0


async def test_without_a_process_a_broken_environment_is_a_fault_all_the_same(
    opened: Callable[..., GymnasiumEnvironments],
) -> None:
    group = await opened("strange_gyms:Strange-v0", how="reset raises", isolation="none").open(0, 1, 0)
    with pytest.raises(EnvironmentFault, match="raised RuntimeError"):
        await group.reset(FIRST)
    await group.aclose()


async def test_a_hanging_step_is_a_timeout(opened: Callable[..., GymnasiumEnvironments]) -> None:
    source = opened("strange_gyms:Strange-v0", how="hangs", step_timeout="0.5")
    group = await source.open(0, 1, 0)
    await group.reset(FIRST)
    with pytest.raises(EnvironmentTimeout):
        await group.step(np.array([0]))
    with pytest.raises(EnvironmentFailure):  # its copies are gone with the process
        await group.step(np.array([0]))
    await group.aclose()


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("CartPole-v0x", {}, "CartPole-v0x"),
        ("NoSuch-v1", {}, "NoSuch-v1"),
        ("CartPole-v1", {"problems": "many"}, "problems='many'"),
        ("CartPole-v1", {"step_timeout": "-1"}, "step_timeout='-1'"),
        ("CartPole-v1", {"isolation": "thread"}, "isolation='thread'"),
    ],
)
def test_what_gymnasium_does_not_have_is_one_clear_error(task: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GymnasiumEnvironments(task, **options)


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [("strange_gyms:Continuous-v0", {}, "discrete"), ("CartPole-v1", {"nonsense": "1"}, "cannot be made")],
)
def test_what_cannot_be_learned_is_refused_with_its_space(task: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _ = GymnasiumEnvironments(task, **options).space
