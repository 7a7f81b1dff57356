"""An environment that any model learns something in at once, and that fails as often as it is told to.

For tests of whole runs on toy models; not an entry point: ``installed`` makes it one for the length of a block. It
knows no rollout. Read next: ``crucible_kitchen.ports.environment``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from random import Random
from unittest.mock import patch

import anyio
import anyio.lowlevel

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.ports.environment import Action, Episode, Observation, Transition
from crucible_kitchen.rl import environments
from crucible_kitchen.types import Message

__all__ = ["Letters", "installed"]


class Letters:
    """Rewards answers by the share of their characters that are small letters, ``turns`` times.

    Args:
        task: unused.
        problems: how many; problem i asks with the i-th letter.
        turns: of one episode.
        crash: share of steps that raise.
        seconds: longest time a step takes; each takes a part of it that depends on problem and member.
    """

    space = None
    name = "letters"

    def __init__(
        self, task: str = "", *, problems: str = "16", turns: str = "1", crash: str = "0", seconds: str = "0"
    ) -> None:
        if task:
            raise ConfigError("the environment 'letters' has no tasks")
        self.problems, self.turns = int(problems), int(turns)
        self.crash, self.seconds = float(crash), float(seconds)
        self.luck = Random(0)
        self.opened = self.closed = 0

    def __len__(self) -> int:
        """Return the number of problems."""
        return self.problems

    async def fingerprint(self) -> str:
        """Return what the problems depend on."""
        await anyio.lowlevel.checkpoint()
        return f"letters-{self.problems}-{self.turns}"

    def held_out(self) -> None:
        """Nothing is held out."""
        return

    async def open(self, problem: int, size: int, seed: int) -> "_Group":
        """Open one problem."""
        if not 0 <= problem < self.problems:
            raise IndexError(problem)
        self.opened += 1
        return _Group(self, problem, size, seed)

    async def aclose(self) -> None:
        """Hold nothing."""


class _Group:
    def __init__(self, source: Letters, problem: int, size: int, seed: int) -> None:
        self._source = source
        self.environments = [_Letters(source, problem, Random(f"{seed}/{i}")) for i in range(size)]

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        await anyio.lowlevel.checkpoint()
        return [0.0] * len(episodes)

    async def aclose(self) -> None:
        self._source.closed += 1


class _Letters:
    def __init__(self, source: Letters, problem: int, rng: Random) -> None:
        self._source, self._problem, self._rng = source, problem, rng
        self._left = source.turns

    async def reset(self) -> Observation:
        await anyio.lowlevel.checkpoint()
        return Observation((Message("user", chr(ord("a") + self._problem % 26)),))

    async def step(self, action: Action) -> Transition:
        source = self._source
        await anyio.sleep(source.seconds * self._rng.random())
        if source.luck.random() < source.crash:
            raise RuntimeError("crashed on purpose")
        self._left -= 1
        good = sum("a" <= c <= "z" for c in action.text)
        reward = good / max(1, len(action.text))
        again = Observation((Message("tool", "+"),)) if self._left else None
        return Transition(reward, terminated=not self._left, observation=again, metrics={"letters": float(good)})


@contextmanager
def installed() -> Iterator[None]:
    """Make ``env=letters`` mean :class:`Letters` for the length of a block."""
    known: Mapping[str, EntryPoint] = environments.environment_entries()
    entry = EntryPoint("letters", f"{__name__}:Letters", environments.GROUP)
    with patch.object(environments, "environment_entries", lambda: {**known, "letters": entry}):
        yield
