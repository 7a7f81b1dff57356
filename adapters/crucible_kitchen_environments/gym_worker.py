"""Copies of one gymnasium environment, stepped together. Runs in a worker process; speaks JSON.

Copies that are over are not stepped again, so there is no automatic reset, and no transition that is none. Read next:
``gym.py``, which asks.
"""

from typing import Any

import gymnasium
from gymnasium.spaces.utils import flatten

__all__ = ["make", "reset", "step"]

_copies: list["gymnasium.Env[Any, Any]"] = []
_over: list[bool] = []
_last: list[list[float]] = []


def make(env_id: str, size: int, settings: dict[str, Any]) -> None:
    """Make new copies, in place of the old ones."""
    while _copies:
        _copies.pop().close()
    _copies.extend(gymnasium.make(env_id, **settings) for _ in range(size))


def reset(seeds: list[int]) -> list[list[float]]:
    """Begin all episodes; return observations [G][D]."""
    _over[:] = [False] * len(_copies)
    _last[:] = [_flat(copy, copy.reset(seed=seed)[0]) for copy, seed in zip(_copies, seeds, strict=True)]
    return list(_last)


def step(actions: list[int]) -> dict[str, list[Any]]:
    """Take one action each; return ``rewards``, ``terminated``, ``truncated`` [G] and ``observations`` [G][D]."""
    moved: dict[str, list[Any]] = {"rewards": [], "terminated": [], "truncated": [], "observations": _last}
    for i, (copy, action) in enumerate(zip(_copies, actions, strict=True)):
        reward, terminated, truncated = 0.0, False, False
        if not _over[i]:
            seen, given, terminated, truncated, _ = copy.step(action + copy.action_space.start)  # type: ignore[attr-defined]
            reward = float(given)
            _last[i] = _flat(copy, seen)
            _over[i] = bool(terminated or truncated)
        moved["rewards"].append(reward)
        moved["terminated"].append(bool(terminated))
        moved["truncated"].append(bool(truncated) and not terminated)
    return moved


def _flat(copy: "gymnasium.Env[Any, Any]", observation: Any) -> list[float]:
    return [float(number) for number in flatten(copy.observation_space, observation)]
