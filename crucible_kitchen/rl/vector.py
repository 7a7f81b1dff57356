"""Rolling out a vector environment: one batched action per step; whole episodes, or a segment of so many steps.

Knows a policy over observations. Read next: ``crucible_kitchen.rl.standing``, which lets an environment go on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import anyio.lowlevel
import numpy as np

from crucible_kitchen.errors import EnvironmentFault
from crucible_kitchen.ports.environment import VectorEnvironment, VectorTransition
from crucible_kitchen.rl.trajectories import Outcome, Scored, Trajectory, Truncated
from crucible_kitchen.types import Acted, Array, Float64Array, IntArray

__all__ = ["Members", "finite", "roll_vector"]


class Published(Protocol):
    """See ``PublishedPolicy``."""

    def current(self) -> AbstractContextManager[tuple[Any, int]]:
        """Use the current policy."""
        ...


def finite(reward: float) -> float:
    """Return a reward as a float.

    Raises:
        EnvironmentFault: it is no finite number.
    """
    if isinstance(reward, (int, float, np.number)) and math.isfinite(reward):
        return float(reward)
    raise EnvironmentFault("a reward is no finite number", hint="return a float; raise EnvironmentFault for no reward")


@dataclass(slots=True, eq=False)
class Members:
    """A vector environment, and where its members are.

    Attributes:
        group: the environment.
        episodes: int64 [G], the number of each member's episode.
        observations: float [G, D], what each sees.
        actions: what each has done since its episode began.
        rewards: float64 [G], what each got for it.
    """

    group: VectorEnvironment
    episodes: IntArray
    observations: Array
    actions: list[list[int]]
    rewards: Float64Array

    @classmethod
    async def begin(cls, group: VectorEnvironment, episodes: Sequence[int] = ()) -> "Members":
        """Begin an episode of each member, the first ones unless others are named."""
        numbers = np.array(episodes or [0] * group.size, dtype=np.int64)
        seen = _array(await group.reset(numbers), (group.size, -1), "observations")
        return cls(group, numbers, seen, [[] for _ in range(group.size)], np.zeros(group.size))

    async def step(self, actions: IntArray) -> VectorTransition:
        """Take one action each, int64 [G]; members with a negative one stay as they are."""
        moved = _checked(await self.group.step(actions), self.observations.shape)
        self.observations = moved.observations
        self.rewards += np.where(actions < 0, 0.0, moved.rewards)
        for done, action in zip(self.actions, actions.tolist(), strict=True):
            if action >= 0:
                done.append(action)
        return moved

    async def next_episodes(self, over: Array) -> None:
        """Begin the next episode of the members that are over, bool [G]."""
        self.episodes[over] += 1
        self.rewards[over] = 0.0
        for member in np.flatnonzero(over):
            self.actions[member] = []
        seen = await self.group.reset(np.where(over, self.episodes, -1))
        self.observations = _array(seen, self.observations.shape, "observations")

    @property
    def steps(self) -> IntArray:
        """int64 [G], how many steps of its episode each has taken."""
        return np.array([len(done) for done in self.actions], dtype=np.int64)


class _Step(NamedTuple):
    """One batched step; [G], observations [G, D]. Members that were not ``live`` did not take it."""

    observations: Array
    actions: IntArray
    logprobs: Array
    versions: IntArray
    rewards: Float64Array
    after: Array
    live: Array
    ended: Array
    terminated: Array


async def roll_vector(
    members: Members,
    policy: Published,
    rng: np.random.Generator,
    *,
    horizon: int,
    max_steps: int,
    spent: dict[str, float],
    now: Callable[[], float],
) -> list[Outcome]:
    """Roll out one episode of every member, or a segment in which one episode follows another.

    Args:
        members: G members; they are moved on.
        policy: gives the current policy over observations.
        rng: of the actions: one row of G uniform numbers per step.
        horizon: steps of a segment; 0 rolls out each member's episode to its end.
        max_steps: episodes that are longer are cut.
        spent: seconds by cause, added to.
        now: the loop's clock.

    Returns:
        One outcome per episode, or part of one, member by member.

    Raises:
        EnvironmentFault: an array has another shape than the contract says, or is not finite.
    """
    taken: list[_Step] = []
    before, so_far = members.steps, members.rewards.copy()
    live = np.ones(members.group.size, dtype=bool)
    for _ in range(horizon or max_steps):
        await anyio.lowlevel.checkpoint()  # neither the policy nor the environment need ever wait
        began = now()
        seen = members.observations
        with policy.current() as (actor, version):
            acted: Acted = await actor.act(seen, rng.random(len(live)))
        chosen = now()
        moved = await members.step(np.where(live, acted.actions, -1))
        ended = live & (moved.terminated | moved.truncated | (members.steps >= max_steps))
        versions = np.full(len(live), version)
        row = (seen, acted.actions, acted.logprobs, versions, moved.rewards, moved.observations)
        taken.append(_Step(*row, live, ended, moved.terminated))
        if horizon and ended.any():
            await members.next_episodes(ended)
        elif not horizon:
            live = live & ~ended
        spent["sampling"] += chosen - began
        spent["environment"] += now() - chosen
        if not live.any():
            break
    rows = _Step(*(np.stack(column) for column in zip(*taken, strict=True)))
    return [
        _outcome(rows, member, begin, end, int(before[member] * first), float(so_far[member] * first))
        for member in range(len(live))
        for begin, end, first in _parts(rows.ended[rows.live[:, member], member])
    ]


def _parts(ended: Array) -> Iterator[tuple[int, int, bool]]:
    """Cut a member's steps, bool [n], behind those that ended an episode: begin, end, and whether it is the first."""
    ends = [*(np.flatnonzero(ended) + 1).tolist(), len(ended)]
    begin = 0
    for end in ends:
        if end > begin:
            yield begin, end, begin == 0
        begin = end


def _outcome(rows: _Step, member: int, begin: int, end: int, steps: int, reward: float) -> Outcome:
    """Return one part of a member's steps, given how many steps and how much reward its episode had before."""
    at, last = (slice(begin, end), member), (end - 1, member)
    goes_on = not rows.ended[last]
    trajectory = Trajectory(
        inputs={"observations": rows.observations[at].astype(np.float32)},
        after={"observations": rows.after[last][None].astype(np.float32)},
        targets=rows.actions[at].astype(np.int64),
        mask=np.ones(end - begin, dtype=bool),
        logprobs=rows.logprobs[at].astype(np.float32),
        versions=rows.versions[at].astype(np.int32),
        rewards=rows.rewards[at].astype(np.float64),
        terminated=bool(rows.ended[last] and rows.terminated[last]),
        metrics={} if goes_on else {"steps": float(steps + end - begin)},
        before=reward,
        goes_on=goes_on,
    )
    return Scored(trajectory) if trajectory.terminated else Truncated(trajectory)


def _checked(moved: VectorTransition, shape: tuple[int, ...]) -> VectorTransition:
    size = shape[:1]
    return VectorTransition(
        _array(moved.rewards, size, "rewards"),
        _array(moved.terminated, size, "terminated").astype(bool),
        _array(moved.truncated, size, "truncated").astype(bool),
        _array(moved.observations, shape, "observations"),
    )


def _array(values: Array, shape: tuple[int, ...], what: str) -> Array:
    found = np.asarray(values)
    fits = found.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, found.shape, strict=True))
    if not fits or found.dtype.kind not in "biuf":
        raise EnvironmentFault(f"{what} have shape {found.shape}, not {shape}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise EnvironmentFault(f"{what} are not finite")
    return found
