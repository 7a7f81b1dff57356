"""Rolling out a vector environment: one batched action per step, one trajectory per member.

Knows a policy over observations. Read next: ``crucible_kitchen.rl.rollout``.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from crucible_kitchen.errors import EnvironmentFault
from crucible_kitchen.ports.environment import VectorEnvironment, VectorTransition
from crucible_kitchen.rl.trajectories import Outcome, Scored, Trajectory, Truncated
from crucible_kitchen.types import Array

__all__ = ["finite", "roll_vector"]


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


async def roll_vector(
    group: VectorEnvironment,
    policy: Published,
    rng: np.random.Generator,
    *,
    max_steps: int,
    spent: dict[str, float],
    now: Callable[[], float],
) -> list[Outcome]:
    """Roll out one episode of every member.

    Args:
        group: G members.
        policy: gives the current policy over observations.
        rng: of the actions: one row of G uniform numbers per step.
        max_steps: episodes that are longer are cut.
        spent: seconds by cause, added to.
        now: the loop's clock.

    Raises:
        EnvironmentFault: an array has another shape than the contract says, or is not finite.
    """
    steps: list[tuple[Array, ...]] = []
    began = now()
    observations = _array(await group.reset(), (group.size, -1), "observations")
    spent["environment"] += now() - began
    over = np.zeros(group.size, dtype=bool)
    lengths = np.full(group.size, max_steps)
    for step in range(max_steps):
        began = now()
        with policy.current() as (actor, version):
            acted = await actor.act(observations, rng.random(group.size))
        chosen = now()
        moved = _checked(await group.step(acted.actions), observations.shape)
        spent["sampling"] += chosen - began
        spent["environment"] += now() - chosen
        steps.append((observations, acted.actions, acted.logprobs, np.full(group.size, version), moved.rewards))
        ended = ~over & (moved.terminated | moved.truncated)
        lengths[ended] = step + 1
        if step == 0:
            terminated, last = np.zeros(group.size, dtype=bool), np.array(moved.observations)
        terminated |= ended & moved.terminated
        last = np.where((~over)[:, None], moved.observations, last)
        over |= ended
        observations = moved.observations
        if over.all():
            break
    return _outcomes(steps, np.minimum(lengths, len(steps)), terminated, last)


def _outcomes(steps: list[tuple[Array, ...]], lengths: Array, terminated: Array, last: Array) -> list[Outcome]:
    """Take the steps [T, G, ...] apart into one trajectory per member."""
    observations, actions, logprobs, versions, rewards = (np.stack(column) for column in zip(*steps, strict=True))
    found: list[Outcome] = []
    for g, n in enumerate(lengths):
        trajectory = Trajectory(
            inputs={"observations": observations[:n, g].astype(np.float32)},
            after={"observations": last[g : g + 1].astype(np.float32)},
            targets=actions[:n, g].astype(np.int64),
            mask=np.ones(n, dtype=bool),
            logprobs=logprobs[:n, g].astype(np.float32),
            versions=versions[:n, g].astype(np.int32),
            rewards=rewards[:n, g].astype(np.float64),
            terminated=bool(terminated[g]),
            metrics={"steps": float(n)},
        )
        found.append(Scored(trajectory) if trajectory.terminated else Truncated(trajectory))
    return found


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
    if not np.isfinite(found).all():
        raise EnvironmentFault(f"{what} are not finite")
    return found
