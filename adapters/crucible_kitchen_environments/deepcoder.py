"""Programming problems: ``deepcoder:problems.jsonl``. The reward is 1 for a program that passes every test.

Programs run in the sandbox, which refuses to start where they cannot be isolated. Rows are in the shapes of
DeepCoder-Preview, LiveCodeBench and TACO; see ``programs.py``. Read next: ``sandbox.py``.
"""

from functools import partial
from typing import cast

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.workers import run_sync
from crucible_kitchen_environments.options import amount, faults_of, whole
from crucible_kitchen_environments.programs import Case, coding_problem, judge, program_in
from crucible_kitchen_environments.questions import QuestionGroup, Verdict
from crucible_kitchen_environments.rows import Problems, read_rows
from crucible_kitchen_environments.sandbox import Isolation, Limits, Sandbox

__all__ = ["DeepCoderEnvironments"]

_INSTRUCTION = "Write a Python program that solves the problem, in one block of ```python."


class DeepCoderEnvironments:
    """Problems of a file or dataset; a twentieth is held out.

    Args:
        task: a ``.jsonl`` file or a dataset of the hub.
        split: of a dataset of the hub.
        sandbox: ``namespaces``, or ``limits-only`` where the kernel does not allow them.
        workers: programs at once.
        tests: of each problem, at most.
        cpu_seconds: of processor time for one test; wall-clock time is three times as long.
        memory_mb: of one program.
        instruction: stands behind every problem.

    Raises:
        ConfigError: no problems are named, or an option does not fit.
    """

    space = None

    def __init__(
        self,
        task: str,
        *,
        split: str = "train",
        sandbox: str = "namespaces",
        workers: str = "2",
        tests: str = "15",
        cpu_seconds: str = "5",
        memory_mb: str = "512",
        instruction: str = _INSTRUCTION,
    ) -> None:
        self.name = f"deepcoder:{task}"
        if not task:
            raise ConfigError("the environment 'deepcoder' needs problems", hint="write env=deepcoder:problems.jsonl")
        if sandbox not in ("namespaces", "limits-only"):
            raise ConfigError(f"the environment {self.name!r}: sandbox={sandbox!r} is no 'namespaces' or 'limits-only'")
        seconds = amount(self.name, "cpu_seconds", cpu_seconds)
        limits = Limits(
            seconds=3 * seconds,
            cpu_seconds=max(1, round(seconds)),
            memory_bytes=whole(self.name, "memory_mb", memory_mb, 64) << 20,
        )
        self._tests = whole(self.name, "tests", tests)
        self._instruction = instruction
        self._sandbox = Sandbox(
            isolation=cast(Isolation, sandbox), workers=whole(self.name, "workers", workers), limits=limits
        )
        self._problems: Problems[tuple[Case, ...]] = Problems(
            self.name, partial(read_rows, task, split), coding_problem
        )

    def __len__(self) -> int:
        """Return the number of problems; reads them."""
        return len(self._problems.all)

    async def fingerprint(self) -> str:
        """Hash all problems and their tests; before that, refuse where their programs could not be run.

        Raises:
            SandboxUnavailable: the kernel does not let programs be isolated.
        """
        await self._sandbox.start()
        return await run_sync(self._problems.fingerprint)

    def held_out(self) -> "DeepCoderEnvironments | None":
        """Return the problems that are held out."""
        problems = self._problems.others()
        if problems is None:
            return None
        other = DeepCoderEnvironments(self.name.partition(":")[2], tests=str(self._tests))
        other._instruction, other._sandbox, other._problems = self._instruction, self._sandbox, problems
        return other

    async def open(self, problem: int, size: int, seed: int) -> QuestionGroup:  # noqa: ARG002 - nothing is random
        """Ask problem ``problem``."""
        question, cases = (await run_sync(lambda: self._problems.all))[problem]
        asked = f"{question}\n{self._instruction}" if self._instruction else question
        return QuestionGroup(asked, partial(self._judge, cases[: self._tests]), size)

    async def _judge(self, cases: tuple[Case, ...], text: str) -> Verdict:
        program = program_in(text)
        if program is None:
            return 0.0, {"correct": 0.0, "passed": 0.0, "programs": 0.0, "limited": 0.0}
        with faults_of("the sandbox"):
            judged = await judge(self._sandbox, program, cases)
        right = float(judged.ended == "passed")
        limited = float(judged.ended not in ("passed", "wrong"))
        return right, {"correct": right, "passed": judged.passed / judged.tests, "programs": 1.0, "limited": limited}

    async def aclose(self) -> None:
        """Kill what runs in the sandbox; it starts anew when it is needed."""
        if not self._problems.held_out:
            await self._sandbox.aclose()
