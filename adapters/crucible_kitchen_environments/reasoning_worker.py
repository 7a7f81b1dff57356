"""Problems of reasoning-gym and their scores. Runs in a worker process; speaks JSON. Read next: ``reasoning.py``."""

from functools import lru_cache
from typing import Any

import reasoning_gym

__all__ = ["question", "score"]


@lru_cache(maxsize=4)
def _problems(name: str, seed: int, size: int, settings: tuple[tuple[str, Any], ...]) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **dict(settings))


def question(name: str, seed: int, size: int, settings: dict[str, Any], index: int) -> str:
    """Return a problem's question."""
    return str(_problems(name, seed, size, tuple(settings.items()))[index]["question"])


def score(name: str, seed: int, size: int, settings: dict[str, Any], index: int, answer: str) -> float:
    """Return what an answer is worth, 0 to 1."""
    problems = _problems(name, seed, size, tuple(settings.items()))
    return float(problems.score_answer(answer=answer, entry=problems[index]))
