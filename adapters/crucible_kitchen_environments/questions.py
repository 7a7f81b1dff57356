"""One question, one answer: the environment that most problems need, around a judge.

Knows no problem. Read next: ``math_problems.py``, ``programs.py`` and ``reasoning.py``, which judge.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import anyio.lowlevel

from crucible_kitchen.ports.environment import Action, Episode, Observation, Transition
from crucible_kitchen.types import Message

__all__ = ["Judge", "QuestionGroup", "Verdict"]

Verdict: TypeAlias = tuple[float, dict[str, float]]
"""A reward, and numbers to report."""

Judge: TypeAlias = Callable[[str], Awaitable[Verdict]]


class _Question:
    def __init__(self, question: str, judge: Judge) -> None:
        self._question = question
        self._judge = judge

    async def reset(self) -> Observation:
        """Ask."""
        await anyio.lowlevel.checkpoint()
        return Observation((Message("user", self._question),))

    async def step(self, action: Action) -> Transition:
        """Judge the one answer there is; the episode is over."""
        reward, metrics = await self._judge(action.text)
        return Transition(reward, terminated=True, metrics=metrics)


class QuestionGroup:
    """One question, asked ``size`` times; nothing is compared and nothing held."""

    def __init__(self, question: str, judge: Judge, size: int) -> None:
        self.environments = [_Question(question, judge) for _ in range(size)]

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        """Compare nothing."""
        await anyio.lowlevel.checkpoint()
        return [0.0] * len(episodes)

    async def aclose(self) -> None:
        """Hold nothing."""
