"""Environments whose reward is a judgement: a scorer compares the answers of a group, whatever the environment says.

Knows environments and a scorer's shape, no model. Read next: ``crucible_kitchen.stages.scoring``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from crucible_kitchen.ports.environment import (
    Action,
    Environment,
    EnvironmentGroup,
    EnvironmentSource,
    Episode,
    Observation,
    Space,
    Transition,
    VectorEnvironment,
)
from crucible_kitchen.types import Message

__all__ = ["ScoredEnvironments", "Scorer"]


class Scorer(Protocol):
    """Somebody who says what answers to one prompt are worth."""

    async def __call__(self, prompt: Sequence[Message], answers: Sequence[str]) -> Sequence[float]:
        """Return one finite number per answer.

        Raises:
            BackendError: whoever judges failed; the group then has no reward at all.
        """
        ...


class ScoredEnvironments:
    """A source whose groups are scored by somebody else; held-out problems are scored by the same.

    Args:
        inner: the problems.
        scorer: says what answers are worth.
        own: what the environment's own reward counts for beside the scorer's.
    """

    def __init__(self, inner: EnvironmentSource, scorer: Scorer, *, own: float = 0.0) -> None:
        self._inner = inner
        self._scorer = scorer
        self._own = own
        self.name = inner.name

    @property
    def space(self) -> Space | None:
        """The environment's: a scorer reads text."""
        return self._inner.space

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self._inner)

    async def fingerprint(self) -> str:
        """Hash the problems; who scores them stands in the config."""
        return await self._inner.fingerprint()

    def held_out(self) -> "ScoredEnvironments | None":
        """Return the held-out problems, scored by the same."""
        inner = self._inner.held_out()
        return None if inner is None else ScoredEnvironments(inner, self._scorer, own=self._own)

    async def open(self, problem: int, size: int, seed: int) -> "EnvironmentGroup | VectorEnvironment":
        """Open a problem; arrays of numbers cannot be judged and are as they were."""
        group = await self._inner.open(problem, size, seed)
        return group if isinstance(group, VectorEnvironment) else _Group(group, self._scorer, self._own)

    async def aclose(self) -> None:
        """Release the problems; the scorer belongs to whoever made it."""
        await self._inner.aclose()


class _Group:
    """One problem: what its members were asked, and their judgement."""

    def __init__(self, inner: EnvironmentGroup, scorer: Scorer, own: float) -> None:
        self._inner = inner
        self._scorer = scorer
        self._own = own
        self.environments: Sequence[Environment] = [_Member(e, own) for e in inner.environments]

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        """Score the members' last answers, and add what the environment itself finds in comparing them."""
        inner = await self._inner.group_rewards(episodes)
        asked = next(m.asked for m in self.environments if isinstance(m, _Member) and m.asked)
        found = await self._scorer(asked, [episode.texts[-1] for episode in episodes])
        return [score + self._own * theirs for score, theirs in zip(found, inner, strict=True)]

    async def aclose(self) -> None:
        """Release the group."""
        await self._inner.aclose()


class _Member:
    """One episode, its rewards multiplied."""

    def __init__(self, inner: Environment, own: float) -> None:
        self._inner = inner
        self._own = own
        self.asked: tuple[Message, ...] = ()

    async def reset(self) -> Observation:
        """Begin the episode and keep the prompt."""
        observation = await self._inner.reset()
        self.asked = observation.messages
        return observation

    async def step(self, action: Action) -> Transition:
        """Take one action."""
        transition = await self._inner.step(action)
        return replace(transition, reward=self._own * transition.reward)
