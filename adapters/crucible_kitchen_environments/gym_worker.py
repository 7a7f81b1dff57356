"""Copies of one gymnasium environment, stepped together; its functions run in a worker process and speak JSON.

Copies that are over are not stepped again, so there is no automatic reset, and no transition that is none. Read next:
``gym.py``, which asks.
"""

from typing import Any

import gymnasium
from gymnasium.spaces.utils import flatten

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
        self._over = [False] * size
        self._last: list[list[float]] = []

    def reset(self, seeds: list[int]) -> list[list[float]]:
        """Begin all episodes; return observations [G][D]."""
        self._over = [False] * len(self._copies)
        self._last = [_flat(copy, copy.reset(seed=seed)[0]) for copy, seed in zip(self._copies, seeds, strict=True)]
        return list(self._last)

    def step(self, actions: list[int]) -> dict[str, list[Any]]:
        """Take one action each; return ``rewards``, ``terminated``, ``truncated`` [G] and ``observations`` [G][D]."""
        moved: dict[str, list[Any]] = {"rewards": [], "terminated": [], "truncated": [], "observations": self._last}
        for i, (copy, action) in enumerate(zip(self._copies, actions, strict=True)):
            reward, terminated, truncated = 0.0, False, False
            if not self._over[i]:
                seen, given, terminated, truncated, _ = copy.step(action + copy.action_space.start)  # type: ignore[attr-defined]
                reward = float(given)
                self._last[i] = _flat(copy, seen)
                self._over[i] = bool(terminated or truncated)
            moved["rewards"].append(reward)
            moved["terminated"].append(bool(terminated))
            moved["truncated"].append(bool(truncated) and not terminated)
        return moved

    def close(self) -> None:
        """Close all copies."""
        while self._copies:
            self._copies.pop().close()


def _flat(copy: "gymnasium.Env[Any, Any]", observation: Any) -> list[float]:
    return [float(number) for number in flatten(copy.observation_space, observation)]


_held: list[Copies] = []  # one at most: what this process steps


def make(env_id: str, size: int, settings: dict[str, Any]) -> None:
    """Hold new copies, in place of the old ones."""
    while _held:
        _held.pop().close()
    _held.append(Copies(env_id, size, settings))


def reset(seeds: list[int]) -> list[list[float]]:
    """Begin all episodes of the copies that are held."""
    return _held[0].reset(seeds)


def step(actions: list[int]) -> dict[str, list[Any]]:
    """Step the copies that are held."""
    return _held[0].step(actions)
