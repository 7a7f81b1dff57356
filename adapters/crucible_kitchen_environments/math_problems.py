r"""Mathematical problems: ``math:problems.jsonl``. The reward is 1 for the right answer in ``\boxed{}``.

Rows have ``problem`` (or ``question``, ``prompt``) and ``answer`` (or ``solution`` with its own ``\boxed{}``). Read
next: ``answers.py``.
"""

from functools import partial
from importlib.util import find_spec

from crucible_kitchen.errors import ConfigError, MissingExtra, RowError
from crucible_kitchen.types import Row
from crucible_kitchen.workers import ProcessPool, run_sync
from crucible_kitchen_environments.answers import boxed, same
from crucible_kitchen_environments.options import amount, faults_of, whole
from crucible_kitchen_environments.questions import QuestionGroup, Verdict
from crucible_kitchen_environments.rows import Problems, first_of, read_rows

__all__ = ["MathEnvironments"]

_EQUAL = "crucible_kitchen_environments.answers:equal"
_LONGEST_ANSWER = 500


class MathEnvironments:
    r"""Problems of a file or dataset; a twentieth is held out.

    Args:
        task: a ``.jsonl`` file or a dataset of the hub.
        split: of a dataset of the hub.
        symbolic: ``true`` also accepts what math-verify proves equal, in a worker process.
        timeout: seconds that one proof may take; a proof that takes longer is a timeout, not a wrong answer.
        workers: proofs at once.
        instruction: stands behind every problem.

    Raises:
        ConfigError: no problems are named, or an option does not fit.
        MissingExtra: ``symbolic`` without math-verify.
    """

    space = None

    def __init__(
        self,
        task: str,
        *,
        split: str = "train",
        symbolic: str = "false",
        timeout: str = "5",
        workers: str = "2",
        instruction: str = "Put the final answer in \\boxed{}.",
    ) -> None:
        self.name = f"math:{task}"
        if not task:
            raise ConfigError("the environment 'math' needs problems", hint="write env=math:problems.jsonl")
        if str(symbolic).lower() not in ("true", "false"):
            raise ConfigError(f"the environment {self.name!r}: symbolic={symbolic!r} is neither true nor false")
        self._symbolic = str(symbolic).lower() == "true"
        if self._symbolic and find_spec("math_verify") is None:
            raise MissingExtra("math-verify", "envs")
        self._instruction = instruction
        self._pool = ProcessPool(
            "math-verify",
            size=whole(self.name, "workers", workers),
            timeout=amount(self.name, "timeout", timeout),
        )
        self._problems: Problems[str] = Problems(self.name, partial(read_rows, task, split), _problem)

    def __len__(self) -> int:
        """Return the number of problems; reads them."""
        return len(self._problems.all)

    async def fingerprint(self) -> str:
        """Hash all problems."""
        return await run_sync(self._problems.fingerprint)

    def held_out(self) -> "MathEnvironments | None":
        """Return the problems that are held out."""
        problems = self._problems.others()
        if problems is None:
            return None
        other = MathEnvironments(self.name.partition(":")[2], instruction=self._instruction)
        other._symbolic, other._pool, other._problems = self._symbolic, self._pool, problems
        return other

    async def open(self, problem: int, size: int, seed: int) -> QuestionGroup:  # noqa: ARG002 - nothing is random
        """Ask problem ``problem``."""
        question, reference = (await run_sync(lambda: self._problems.all))[problem]
        asked = f"{question}\n{self._instruction}" if self._instruction else question
        return QuestionGroup(asked, partial(self._judge, reference), size)

    async def _judge(self, reference: str, text: str) -> Verdict:
        answer = boxed(text)
        right = answer is not None and len(answer) <= _LONGEST_ANSWER and await self._equal(answer, reference)
        return float(right), {"correct": float(right), "boxed": float(answer is not None)}

    async def _equal(self, answer: str, reference: str) -> bool:
        if same(answer, reference) or not self._symbolic:
            return same(answer, reference)
        with faults_of("the comparison of an answer"):
            return bool(await self._pool.call(_EQUAL, answer, reference))

    async def aclose(self) -> None:
        """End the worker processes; they start anew when they are needed."""
        if not self._problems.held_out:
            await self._pool.aclose()


def _problem(row: Row, index: int) -> tuple[str, str]:
    question = str(first_of(row, index, "problem", "question", "prompt"))
    answer = str(first_of(row, index, "answer", "solution"))
    answer = boxed(answer) or answer
    if not answer.strip():
        raise RowError(index, "answer", "is empty")
    return question, answer
