"""Programs against tests: what a model wrote, run in the sandbox, its output compared here.

The expected outputs never enter the sandbox, so nothing a program prints can be a verdict. Knows no environment. Read
next: ``sandbox.py`` and ``deepcoder.py``.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crucible_kitchen.errors import RowError
from crucible_kitchen.types import Row
from crucible_kitchen_environments.rows import first_of
from crucible_kitchen_environments.sandbox import Sandbox

__all__ = ["Case", "Judged", "coding_problem", "judge", "program_in"]

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
_RELATIVE = 1e-6  # of floating-point numbers in outputs

_CALL = """\
import json, os, sys
_answers = os.dup(1)
os.dup2(2, 1)
_names = {{"__name__": "program"}}
exec("from typing import *; from collections import *; from itertools import *; from functools import *", _names)
exec("import math, heapq, bisect, string, random, re", _names)
exec(compile({program!r}, "program.py", "exec"), _names)
_function = _names.get({function!r}) or getattr(_names["Solution"](), {function!r})
_left = json.dumps(_function(*json.loads(sys.stdin.read()))).encode()
while _left:
    _left = _left[os.write(_answers, _left):]
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One test: what a program is given, and what is expected of it.

    Attributes:
        given: standard input, or the arguments as a JSON list.
        expected: standard output, or the value.
        function: what is called; empty for a program that reads and prints.
    """

    given: str
    expected: Any
    function: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of a program: tests passed of those there are (it stops at the first that fails), and why it ended.

    ``ended`` is ``passed``, ``wrong`` (also: raised), or the limit that was exceeded.
    """

    passed: int
    tests: int
    ended: str


def program_in(text: str) -> str | None:
    """Return the last fenced block of Python in a text, or the last block without a language; None without any."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in ("", "python", "python3", "py")]
    return blocks[-1] if blocks else None


async def judge(sandbox: Sandbox, program: str, cases: Sequence[Case]) -> Judged:
    """Run a program on its tests, one after the other, until one fails.

    Raises:
        SandboxUnavailable: programs cannot be isolated here.
        WorkerError: the sandbox itself broke; the program is not judged.
    """
    for passed, case in enumerate(cases):
        text = _CALL.format(program=program, function=case.function) if case.function else program
        ran = await sandbox.run(text, case.given)
        if ran.ended != "exited":
            return Judged(passed, len(cases), ran.ended)
        right = _value_is(ran.stdout, case.expected) if case.function else _prints(ran.stdout, case.expected)
        if ran.exit_code != 0 or not right:
            return Judged(passed, len(cases), "wrong")
    return Judged(len(cases), len(cases), "passed")


def _prints(printed: str, expected: str) -> bool:
    """Compare outputs word by word and line by line; space at the ends and empty lines at the end do not count."""
    ours, theirs = ([line.split() for line in text.rstrip().splitlines()] for text in (printed, expected))
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(map(_words_equal, a, b)) for a, b in zip(ours, theirs, strict=True)
    )


def _words_equal(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    if not re.search(r"\d\.|\.\d|\d[eE]", theirs):  # whole numbers and words are equal or not
        return False
    try:
        return math.isclose(float(ours), float(theirs), rel_tol=_RELATIVE, abs_tol=_RELATIVE)
    except ValueError:
        return False


def _value_is(printed: str, expected: Any) -> bool:
    try:
        return _equal(json.loads(printed), expected)
    except (ValueError, RecursionError):
        return False


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if isinstance(ours, float) or isinstance(theirs, float):
        numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in (ours, theirs))
        return numbers and math.isclose(ours, theirs, rel_tol=_RELATIVE, abs_tol=_RELATIVE)
    return type(ours) is type(theirs) and bool(ours == theirs)


def coding_problem(row: Row, index: int) -> tuple[str, tuple[Case, ...]]:
    """Return a row's question and tests, in any of the shapes that the field's datasets have.

    ``tests`` (or ``input_output``) is JSON text or a value: ``{"inputs": [...], "outputs": [...], "fn_name": ...}``, or
    a list of ``{"input", "output"}`` with ``fn_name``, or with ``testtype: functional`` and a function's name in
    ``metadata``.

    Raises:
        RowError: something is missing or of another shape.
    """
    question = str(first_of(row, index, "problem", "question", "prompt"))
    tests = first_of(row, index, "tests", "input_output", "test_cases")
    try:
        tests = json.loads(tests) if isinstance(tests, str) else tests
        cases = _paired(tests) if isinstance(tests, dict) else tuple(_listed(test, row) for test in tests)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RowError(index, "tests", f"has another shape than is understood ({type(error).__name__})") from error
    if not cases:
        raise RowError(index, "tests", "is empty")
    return question, cases


def _paired(tests: dict[str, Any]) -> tuple[Case, ...]:
    function = tests.get("fn_name") or ""
    pairs = zip(tests["inputs"], tests["outputs"], strict=True)
    if not function:
        return tuple(Case(_text(given), _text(expected)) for given, expected in pairs)
    return tuple(Case(json.dumps(list(given)), _unwrapped(expected), function) for given, expected in pairs)


def _unwrapped(expected: Any) -> Any:
    """Return the value of an output that its dataset wrote as a list of one."""
    return expected[0] if isinstance(expected, list) and len(expected) == 1 else expected


def _listed(test: dict[str, Any], row: Row) -> Case:
    if test.get("fn_name"):
        return Case(json.dumps(list(test["input"])), _unwrapped(test["output"]), test["fn_name"])
    if test.get("testtype") == "functional":
        metadata = test.get("metadata") or row.get("metadata") or {}
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        arguments = [json.loads(line) for line in str(test["input"]).splitlines() if line.strip()]
        return Case(json.dumps(arguments), json.loads(test["output"]), str(metadata["func_name"]))
    return Case(_text(test["input"]), _text(test["output"]))


def _text(value: Any) -> str:
    """Return lines as one text."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
