"""An environment of several turns with a tool: arithmetic with a calculator, ``calculator``.

The policy either writes ``<calc>12*34</calc>``, is told the value and goes on, or ends with ``<answer>408</answer>``.
It is small enough to read, and what to copy for tools of your own: what a tool says is an observation, never trained
on. Read next: ``crucible_kitchen.ports.environment``.
"""

import ast
import hashlib
import json
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

import anyio.lowlevel

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.ports.environment import Action, Episode, Observation, Transition
from crucible_kitchen.types import Message
from crucible_kitchen_environments.options import whole

__all__ = ["CalculatorEnvironments", "calculate"]

_CALL = re.compile(r"<calc>(.*?)(?:</calc>|$)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 100


def calculate(expression: str) -> str:
    """Return the exact value of a sum, difference, product or quotient of numbers, or what is wrong with it."""
    if len(expression) > _LONGEST:
        return "error: too long"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not understood"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


class _Calculation:
    """One member: question, calls, answer."""

    def __init__(self, expression: str, calls: int) -> None:
        self._expression = expression
        self._left = self._calls = calls

    async def reset(self) -> Observation:
        """Ask."""
        await anyio.lowlevel.checkpoint()
        asked = f"{self._expression} = ? Write <calc>...</calc> to calculate, <answer>...</answer> to end.\n"
        return Observation((Message("user", asked),), stop=("</calc>", "</answer>"))

    async def step(self, action: Action) -> Transition:
        """Answer a call, or judge an answer; a turn that is neither ends the episode without a reward."""
        await anyio.lowlevel.checkpoint()
        answers, calls = _ANSWER.findall(action.text), _CALL.findall(action.text)
        metrics = {"calls": float(self._calls - self._left)}
        if answers:
            right = float(calculate(answers[-1]) == calculate(self._expression))
            return Transition(right, terminated=True, metrics={**metrics, "correct": right})
        if not calls:
            return Transition(0.0, terminated=True, metrics={**metrics, "correct": 0.0})
        if not self._left:
            return Transition(0.0, terminated=False, truncated=True, metrics={**metrics, "correct": 0.0})
        self._left -= 1
        said = Observation((Message("tool", f"{calculate(calls[-1])}\n"),), stop=("</calc>", "</answer>"))
        return Transition(0.0, terminated=False, observation=said, metrics=metrics)


class _Group:
    """One question; right answers that took the fewest calls get the bonus."""

    def __init__(self, expression: str, size: int, calls: int, bonus: float) -> None:
        self.environments = [_Calculation(expression, calls) for _ in range(size)]
        self._bonus = bonus

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        """Compare the right answers: those that took the fewest calls get the bonus."""
        await anyio.lowlevel.checkpoint()
        calls = [e.metrics.get("calls", 0.0) for e in episodes if e.metrics.get("correct") == 1.0]
        fewest = min(calls, default=-1.0)
        return [
            self._bonus if e.metrics.get("correct") == 1.0 and e.metrics.get("calls", 0.0) == fewest else 0.0
            for e in episodes
        ]

    async def aclose(self) -> None:
        """Hold nothing."""


class CalculatorEnvironments:
    """Expressions of three numbers.

    Args:
        task: must be empty.
        size: problems to train on; a hundred others are held out.
        calls: of the calculator, at most; one more cuts the episode.
        bonus: for the group's right answers with the fewest calls, compared within the group; a whole number.

    Raises:
        ConfigError: an option does not fit.
    """

    space = None
    name = "calculator"

    def __init__(self, task: str, *, size: str = "1000", calls: str = "3", bonus: str = "0") -> None:
        if task:
            raise ConfigError("the environment 'calculator' has no tasks", hint="write env=calculator")
        self._size, self._first = whole(self.name, "size", size), 0
        self._calls, self._bonus = whole(self.name, "calls", calls), whole(self.name, "bonus", bonus, 0)

    def __len__(self) -> int:
        """Return the number of problems."""
        return self._size

    async def fingerprint(self) -> str:
        """Hash the options: they determine every problem."""
        await anyio.lowlevel.checkpoint()
        text = json.dumps([self.name, self._first, self._size, self._calls, self._bonus])
        return hashlib.sha256(text.encode()).hexdigest()

    def held_out(self) -> "CalculatorEnvironments | None":
        """Return a hundred other problems; none for those."""
        if self._first:
            return None
        other = CalculatorEnvironments("", size="100", calls=str(self._calls), bonus=str(self._bonus))
        other._first = 1 << 40
        return other

    async def open(self, problem: int, size: int, seed: int) -> _Group:  # noqa: ARG002 - nothing here is random
        """Ask problem ``problem``."""
        await anyio.lowlevel.checkpoint()
        if not 0 <= problem < self._size:
            raise IndexError(f"{self.name} has no problem {problem}")
        rng = Random(self._first + problem)
        a, b, c = (rng.randrange(2, 100) for _ in range(3))
        return _Group(f"{a}{rng.choice('+-*')}{b}{rng.choice('+-*')}{c}", size, self._calls, float(self._bonus))

    async def aclose(self) -> None:
        """Hold nothing."""
