"""The built-in tasks as environments: one question, one answer, reward 1 if it is right and 0 if not.

Knows tasks, no model. Read next: ``crucible_kitchen.tasks``.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial

import anyio.lowlevel

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.ports.environment import Action, Episode, Observation, Transition
from crucible_kitchen.tasks import TASKS, TaskRows, open_task
from crucible_kitchen.types import Message, Row

__all__ = ["TaskEnvironments", "parity", "reverse", "sort", "sums"]


class _Question:
    """One member: the question, then the verdict."""

    def __init__(self, rows: TaskRows, row: Row) -> None:
        self._rows = rows
        self._row = row

    async def reset(self) -> Observation:
        """Ask."""
        await anyio.lowlevel.checkpoint()
        return Observation((Message("user", str(self._row["prompt"])),))

    async def step(self, action: Action) -> Transition:
        """Judge; an answer that was cut off is wrong unless it is right as it stands."""
        await anyio.lowlevel.checkpoint()
        right = self._rows.task.verify(self._row, action.text)
        return Transition(float(right), terminated=True, metrics={"correct": float(right)})


class _Group:
    """One problem, asked several times."""

    def __init__(self, rows: TaskRows, row: Row, size: int) -> None:
        self.environments = [_Question(rows, row) for _ in range(size)]

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        """Compare nothing."""
        await anyio.lowlevel.checkpoint()
        return [0.0] * len(episodes)

    async def aclose(self) -> None:
        """Hold nothing."""


class TaskEnvironments:
    """A built-in task's problems; held out are those of its test split.

    Args:
        name: of the task.
        task: must be empty: the name says it all.
        difficulty: see the task. The least by default, which the built-in model learns in a minute.
        size: so many problems; 0 for the task's own default.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        ConfigError: an option does not fit.
    """

    space = None

    def __init__(self, name: str, task: str, *, difficulty: str = "1", size: str = "0", split: str = "train") -> None:
        if task:
            raise ConfigError(f"the environment {name!r} has no tasks", hint=f"write env={name}")
        if not str(size).isdecimal():
            raise ConfigError(f"the environment {name!r}: size={size!r} is not a number")
        self.name = name
        self._options = {"difficulty": str(difficulty), "size": str(size)}
        self._rows = open_task(name, split=split, limit=int(size), options={"difficulty": str(difficulty)})

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self._rows)

    async def fingerprint(self) -> str:
        """Hash the options: they determine every problem."""
        await anyio.lowlevel.checkpoint()
        text = json.dumps([self.name, self._rows.split, self._options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def held_out(self) -> "TaskEnvironments | None":
        """Return the test split's problems; none for the test split itself."""
        if self._rows.split == "test":
            return None
        return TaskEnvironments(self.name, "", difficulty=self._options["difficulty"], split="test")

    async def open(self, problem: int, size: int, seed: int) -> _Group:  # noqa: ARG002 - nothing here is random
        """Ask problem ``problem``."""
        await anyio.lowlevel.checkpoint()
        return _Group(self._rows, self._rows[problem], size)

    async def aclose(self) -> None:
        """Hold nothing."""


sums, reverse, sort, parity = (partial(TaskEnvironments, name) for name in TASKS)
