"""The tasks of reasoning-gym: ``reasoning_gym:leg_counting``. The reward is the task's own score, from 0 to 1.

Problems and scores are made in worker processes: the package's code may take long. Read next: ``reasoning_worker.py``.
"""

import difflib
import hashlib
import json
import re
from functools import partial
from importlib.metadata import version
from typing import Any

import anyio.lowlevel

from crucible_kitchen.errors import ConfigError, MissingExtra
from crucible_kitchen.workers import ProcessPool
from crucible_kitchen_environments.options import amount, faults_of, value, whole
from crucible_kitchen_environments.questions import QuestionGroup, Verdict

__all__ = ["ReasoningGymEnvironments"]

_WORKER = "crucible_kitchen_environments.reasoning_worker"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HELD_OUT_SEED = 1 << 31


class ReasoningGymEnvironments:
    """One task; held out are a hundred problems of another seed.

    Args:
        task: its name.
        size: problems to train on.
        problem_seed: of the problems.
        timeout: seconds one score may take.
        workers: scores at once.
        instruction: stands behind every question.
        settings: the task's own.

    Raises:
        MissingExtra: reasoning-gym is not installed.
        ConfigError: there is no such task, or an option does not fit.
    """

    space = None

    def __init__(
        self,
        task: str,
        *,
        size: str = "1000",
        problem_seed: str = "0",
        timeout: str = "30",
        workers: str = "2",
        instruction: str = "Put the answer between <answer> and </answer>.",
        **settings: str,
    ) -> None:
        self.name = f"reasoning_gym:{task}"
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise MissingExtra("reasoning-gym", "envs") from error
        if task not in DATASETS:
            near = difflib.get_close_matches(task, DATASETS, n=3)
            raise ConfigError(f"reasoning-gym has no task {task!r}", hint=f"near it: {', '.join(near) or 'none'}")
        self._size = whole(self.name, "size", size)
        self._settings: dict[str, Any] = {key: value(str(text)) for key, text in settings.items()}
        self._problems = (task, whole(self.name, "problem_seed", problem_seed, 0), self._size, self._settings)
        self._instruction = instruction
        self._workers = whole(self.name, "workers", workers)
        self._timeout = amount(self.name, "timeout", timeout)
        self._pool = ProcessPool("reasoning-gym", size=self._workers, timeout=self._timeout)

    def __len__(self) -> int:
        """Return the number of problems."""
        return self._size

    async def fingerprint(self) -> str:
        """Hash task, seed, settings and the package's version: they determine every problem."""
        await anyio.lowlevel.checkpoint()
        text = json.dumps([self._problems, self._instruction, version("reasoning-gym")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def held_out(self) -> "ReasoningGymEnvironments | None":
        """Return a hundred problems of another seed; none for those."""
        task, seed, _, _ = self._problems
        if seed >= _HELD_OUT_SEED:
            return None
        options = {key: str(text) for key, text in self._settings.items()}
        return ReasoningGymEnvironments(
            task,
            size="100",
            problem_seed=str(seed + _HELD_OUT_SEED),
            timeout=str(self._timeout),
            workers=str(self._workers),
            instruction=self._instruction,
            **options,
        )

    async def open(self, problem: int, size: int, seed: int) -> QuestionGroup:  # noqa: ARG002 - nothing is random
        """Ask problem ``problem``."""
        if not 0 <= problem < self._size:
            raise IndexError(f"{self.name} has no problem {problem}")
        with faults_of(f"a problem of {self.name}"):
            # The first call imports the package, which takes its time.
            question = await self._pool.call(f"{_WORKER}:question", *self._problems, problem, timeout=120.0)
        asked = f"{question}\n{self._instruction}" if self._instruction else str(question)
        return QuestionGroup(asked, partial(self._judge, problem), size)

    async def _judge(self, problem: int, text: str) -> Verdict:
        found = _ANSWER.findall(text)
        answer = (found[-1] if found else text).strip()
        with faults_of(f"a score of {self.name}"):
            score = await self._pool.call(f"{_WORKER}:score", *self._problems, problem, answer)
        return float(score), {"score": float(score), "correct": float(score == 1.0)}

    async def aclose(self) -> None:
        """End the worker processes. Idempotent."""
        await self._pool.aclose()
