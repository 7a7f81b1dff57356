"""Copies of one gymnasium environment, stepped together; its functions run in a worker process and speak JSON.

There is no automatic reset, and so no transition that is none. Read next: ``gym.py``, which asks.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces.utils import flatten

from crucible_kitchen.types import Array

__all__ = ["Copies", "make", "reset", "step"]


class Copies:
    """Copies of an environment.

    Args:
        env_id: as it is registered.
        size: G.
        settings: the environment's own keyword arguments.
    """

    def __init__(self, env_id: str, size: int, settings: dict[str, Any]) -> None:
        self._copies = [gymnasium.make(env_id, **settings) for _ in range(size)]
        self._spaces = [copy.observation_space for copy in self._copies]
        self._first = [int(copy.action_space.start) for copy in self._copies]  # type: ignore[attr-defined]
        self._last: list[Array] = [np.zeros(0)] * size

    def reset(self, seeds: list[int | None]) -> list[Array]:
        """Begin episodes, where there is a seed; return observations [G][D]."""
        for i, (copy, seed) in enumerate(zip(self._copies, seeds, strict=True)):
            if seed is not None:
                self._last[i] = np.asarray(flatten(self._spaces[i], copy.reset(seed=seed)[0]))
        return list(self._last)

    def step(self, actions: list[int]) -> dict[str, list[Any]]:
        """Take one action each, where it is not negative.

        Returns:
            ``rewards``, ``terminated``, ``truncated`` [G] and ``observations`` [G][D].
        """
        moved: dict[str, list[Any]] = {"rewards": [], "terminated": [], "truncated": []}
        for i, (copy, action) in enumerate(zip(self._copies, actions, strict=True)):
            reward, terminated, truncated = 0.0, False, False
            if action >= 0:
                seen, given, terminated, truncated, _ = copy.step(action + self._first[i])
                reward = float(given)
                self._last[i] = np.asarray(flatten(self._spaces[i], seen))
            moved["rewards"].append(reward)
            moved["terminated"].append(bool(terminated))
            moved["truncated"].append(bool(truncated) and not terminated)
        moved["observations"] = list(self._last)
        return moved

    def close(self) -> None:
        """Close all copies."""
        while self._copies:
            self._copies.pop().close()


_held: list[Copies] = []  # one at most: what this process steps


def make(env_id: str, size: int, settings: dict[str, Any]) -> None:
    """Hold new copies, in place of the old ones."""
    while _held:
        _held.pop().close()
    _held.append(Copies(env_id, size, settings))


def reset(seeds: list[int | None]) -> list[list[float]]:
    """Begin episodes of the copies that are held."""
    return _listed(_held[0].reset(seeds))


def step(actions: list[int]) -> dict[str, list[Any]]:
    """Step the copies that are held."""
    moved = _held[0].step(actions)
    return moved | {"observations": _listed(moved["observations"])}


def _listed(observations: list[Array]) -> list[list[float]]:
    return [observation.tolist() for observation in observations]
