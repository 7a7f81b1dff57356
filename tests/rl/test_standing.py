"""A vector environment that goes on: segments of so many steps, and how another environment is brought to their end."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.config import build_config
from crucible_kitchen.errors import ConfigError
from crucible_kitchen.ports.environment import VectorTransition
from crucible_kitchen.rl.policy import PublishedPolicy
from crucible_kitchen.rl.rollout import Roller, RolloutRules
from crucible_kitchen.rl.standing import Standing
from crucible_kitchen.rl.trajectories import Ticket
from crucible_kitchen.types import Acted
from crucible_kitchen.workflows.reinforcement import ReinforcementConfig

pytestmark = pytest.mark.anyio


class Walk:
    """Members walk up with action 1 and down with 0 from a height that member and episode give; 0 and 6 end it."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.closed = size, seed, False
        self.at = np.zeros(size, np.int64)
        self.fails_at = -1
        self.steps = 0

    async def reset(self, episodes):
        for g, episode in enumerate(episodes):
            if episode >= 0:
                self.at[g] = 2 + (self.seed + g + episode) % 3
        return self.at[:, None].astype(np.float32)

    async def step(self, actions):
        if self.steps == self.fails_at:
            raise RuntimeError("fell over")
        self.steps += 1
        self.at += np.where(actions < 0, 0, 2 * actions - 1)
        over = (self.at <= 0) | (self.at >= 6)
        return VectorTransition(self.at.astype(float), over, np.zeros(self.size, bool), self.at[:, None] * 1.0)

    async def aclose(self):
        self.closed = True


class Walks:
    """Opens walks and remembers them; ``make`` changes a new one."""

    def __init__(self, make: Any = lambda walk: walk) -> None:
        self.opened: list[Walk] = []
        self._make = make

    async def open(self, problem, size, seed):
        self.opened.append(self._make(Walk(size, seed % 1000)))
        return self.opened[-1]


class Actor:
    async def act(self, observations, uniforms=None):
        return Acted((uniforms > 0.5).astype(np.int64), np.full(len(observations), -0.7, np.float32))

    async def aclose(self):
        pass


def roller(walks, **rules):
    rules = RolloutRules(**{"group_size": 3, "horizon": 12, "attempts": 1, **rules})
    return Roller(walks, PublishedPolicy(Actor(), 2), rules, standing=Standing())


async def segments(roll, count, carried=None, first=0):
    """Roll out groups one after the other, as the pipeline does."""
    found = []
    for index in range(first, first + count):
        found.append(await roll(Ticket(index, index, carried)))
        carried = found[-1].carried
    return found


def content(groups):
    """Return everything that groups are trained on."""
    keys = ("targets", "logprobs", "rewards", "versions")
    return [
        [
            t.inputs["observations"].tolist(),
            t.after["observations"].tolist(),
            *(getattr(t, key).tolist() for key in keys),
            (t.terminated, t.goes_on, t.before),
        ]
        for group in groups
        for t in group.trajectories
    ]


async def test_a_segment_has_as_many_steps_of_each_member_whatever_ends_in_it():
    (group,) = await segments(roller(Walks()), 1)
    assert group.length == 3 * 12
    assert len(group.outcomes) > 3
    assert [t.goes_on for t in group.trajectories].count(True) <= 3
    for t in group.trajectories:
        seen = t.inputs["observations"][:, 0]
        assert np.array_equal(seen[1:], t.rewards[:-1])  # within an episode, what an action led to is seen next
        assert t.after["observations"][0, 0] == t.rewards[-1]  # also where it ended: before the reset
        assert t.terminated == (t.rewards[-1] in (0, 6)) != t.goes_on


async def test_the_next_segment_goes_on_with_the_episodes_and_their_rewards():
    roll = roller(Walks(), horizon=4)
    groups = await segments(roll, 6)
    for member in range(3):
        parts = [t for g in groups for t in _of_member(g, member, 4)]
        for earlier, later in pairwise(parts):
            if earlier.goes_on:
                assert later.inputs["observations"][0, 0] == earlier.after["observations"][0, 0]
                assert later.before == earlier.reward
            else:
                assert later.before == 0
                assert earlier.metrics["steps"] >= 1
    assert len(roll._source.opened) == 1


def _of_member(group, member, horizon):
    """Return a member's parts: each member has so many steps, one after the other."""
    found, steps = [], 0
    for t in group.trajectories:
        if steps // horizon == member:
            found.append(t)
        steps += len(t)
    return found


@pytest.mark.parametrize("stop", [1, 2, 3])
async def test_another_environment_is_brought_to_the_same_place_by_what_a_group_hands_on(stop):
    whole = await segments(roller(Walks()), 5)
    walks = Walks()
    before = await segments(roller(walks), stop)
    carried = json.loads(json.dumps(before[-1].carried))  # as a checkpoint holds it
    after = await segments(roller(walks), 5 - stop, carried, first=stop)
    assert content([*before, *after]) == content(whole)


async def test_a_segment_that_fails_is_tried_again_from_the_same_place():
    def stumbling(walk):
        walk.fails_at = 17 if not walks.opened else -1
        return walk

    walks = Walks(stumbling)
    groups = await segments(roller(walks, attempts=2), 3)
    assert [group.retries for group in groups] == [0, 1, 0]
    assert content(groups) == content(await segments(roller(Walks()), 3))
    assert [walk.closed for walk in walks.opened] == [True, False]


async def test_after_a_segment_that_came_to_nothing_a_new_environment_begins():
    def weak(walk):
        walk.fails_at = 17
        return walk

    walks = Walks(weak)
    first, second, third = await segments(roller(walks), 3)
    assert (first.unusable, third.unusable) == (None, None)
    assert second.kinds == {"env_fault": 3}
    assert second.carried is None
    assert third.trajectories[0].before == 0
    assert [walk.closed for walk in walks.opened] == [True, False]


async def test_an_environment_that_does_not_do_the_same_again_is_a_fault():
    drift = iter(range(10))

    def drifting(walk):
        walk.seed += next(drift)
        return walk

    (first,) = await segments(roller(Walks(drifting)), 1)
    walks = Walks(drifting)
    (second,) = await segments(roller(walks), 1, first.carried, first=1)
    assert "does not do the same again" in (second.unusable or "")
    assert all(walk.closed for walk in walks.opened)


async def test_an_episode_that_is_too_long_is_cut_and_the_next_begins():
    (group,) = await segments(roller(Walks(), max_turns=2), 1)
    assert {len(t) for t in group.trajectories} <= {1, 2}
    assert any(not t.terminated and not t.goes_on for t in group.trajectories)


@pytest.mark.parametrize(
    ("values", "says"),
    [({"groups_per_batch": 2}, "groups_per_batch=1"), ({"groups_per_batch": 1, "concurrent_groups": 2}, "goes on")],
)
def test_one_environment_goes_on(values, says):
    with pytest.raises(ConfigError, match=says):
        build_config(ReinforcementConfig, {"model": "mlp", "env": "gymnasium:CartPole-v1", "horizon": 8, **values})
