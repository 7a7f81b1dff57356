"""Programs against tests: right, wrong, slow and hostile ones, and the reward of each."""

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from crucible_kitchen.errors import ConfigError, RowError, SandboxUnavailable
from crucible_kitchen.ports.environment import Action
from crucible_kitchen_environments import sandbox as sandbox_module
from crucible_kitchen_environments.deepcoder import DeepCoderEnvironments
from crucible_kitchen_environments.programs import coding_problem, judge, program_in
from crucible_kitchen_environments.sandbox import Limits, Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")]

DOUBLE = {
    "problem": "Double the number.",
    "tests": json.dumps({"inputs": ["1\n", "21\n"], "outputs": ["2\n", "42\n"]}),
}
ADD = {
    "problem": "Add two numbers.",
    "tests": json.dumps({"inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]], "fn_name": "add"}),
}


@pytest.fixture
async def sandbox(namespaces: None) -> AsyncIterator[Sandbox]:
    async with Sandbox(workers=1, limits=Limits(seconds=3.0, cpu_seconds=2)) as sandbox:
        yield sandbox


HOSTILE = """
import builtins, json, os, sys
class Right(str):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def add(a, b):
    for fd in range(3, 64):
        try: os.write(fd, b'{"passed": 2, "tests": 2, "ended": "passed"}')
        except OSError: pass
    return Right("right")
"""


@pytest.mark.parametrize(
    ("row", "program", "passed", "ended"),
    [
        (DOUBLE, "print(int(input()) * 2)", 2, "passed"),
        (DOUBLE, "print(int(input()) + 1)", 1, "wrong"),
        (DOUBLE, "print(2)", 1, "wrong"),
        (DOUBLE, "print(int(input()) * 2)\nraise SystemExit(1)", 0, "wrong"),
        (DOUBLE, "this is no program", 0, "wrong"),
        (DOUBLE, "while True: pass", 0, "time"),
        (DOUBLE, "while True: print('x' * 1000)", 0, "output"),
        (DOUBLE, "print('all tests passed'); import os; os._exit(0)", 0, "wrong"),
        (ADD, "def add(a, b):\n    print('noise')\n    return a + b", 2, "passed"),
        (ADD, "class Solution:\n    def add(self, a: int, b: List[int]):\n        return a + b", 2, "passed"),
        (ADD, "def add(a, b): return a * b + 1", 1, "wrong"),
        (ADD, "def add(a, b): return float(a + b)", 2, "passed"),
        (ADD, "def add(a, b): return str(a + b)", 0, "wrong"),
        (ADD, "def sub(a, b): return a - b", 0, "wrong"),
        (ADD, "def add(a, b): raise ValueError", 0, "wrong"),
        (ADD, "def add(a, b):\n    while True: pass", 0, "time"),
        (ADD, HOSTILE, 0, "wrong"),
        (ADD, "import sys, os\nos.write(1, b'3')\nsys.exit(0)", 0, "wrong"),
    ],
)
async def test_only_a_program_that_gives_every_expected_output_passes(
    sandbox: Sandbox, row: dict[str, str], program: str, passed: int, ended: str
) -> None:
    _, cases = coding_problem(row, 0)
    with anyio.fail_after(60):
        judged = await judge(sandbox, program, cases)
    assert (judged.passed, judged.tests, judged.ended) == (passed, 2, ended)


@pytest.mark.parametrize(
    ("printed", "expected", "right"),
    [
        ("1 2\n3", "1  2 \n3\n\n", True),
        ("1\n2", "1 2", False),
        ("0.3333333", "0.33333330001", True),
        ("0.3", "0.33", False),
        ("1.0", "1", False),
        ("YES", "yes", False),
        ("", "0", False),
    ],
)
async def test_outputs_are_compared_by_lines_and_words(
    sandbox: Sandbox, printed: str, expected: str, right: bool
) -> None:
    _, cases = coding_problem({"problem": "?", "tests": [{"input": "", "output": expected}]}, 0)
    assert ((await judge(sandbox, f"print({printed!r})", cases)).ended == "passed") is right


@pytest.mark.parametrize(
    ("tests", "given", "expected", "function"),
    [
        ([{"type": "stdin_stdout", "input": "1\n", "output": "2\n"}], "1\n", "2\n", ""),
        ([{"input": [1, [2]], "output": 3, "fn_name": "f"}], "[1, [2]]", 3, "f"),
        ({"inputs": [["a", "b"]], "outputs": [["c", "d"]]}, "a\nb", "c\nd", ""),
        (
            [{"input": '[1, 2]\n"x"', "output": "true", "testtype": "functional", "metadata": {"func_name": "g"}}],
            '[[1, 2], "x"]',
            True,
            "g",
        ),
    ],
)
def test_the_shapes_of_the_fields_datasets_are_understood(tests: Any, given: str, expected: Any, function: str) -> None:
    for written in (tests, json.dumps(tests)):
        _, (case,) = coding_problem({"question": "?", "tests": written}, 0)
        assert (case.given, case.expected, case.function) == (given, expected, function)


@pytest.mark.parametrize("tests", ["no json", [], [{"input": "1"}], {"inputs": ["1"], "outputs": []}, 7])
def test_tests_that_are_none_are_an_error_of_their_row(tests: Any) -> None:
    with pytest.raises(RowError, match="row 3, field 'tests'"):
        coding_problem({"problem": "?", "tests": tests}, 3)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("no program", None),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\na\n```\nbetter:\n```python\nb\n```\n", "b\n"),
        ("```python\na\n```\n```text\noutput\n```", "a\n"),
        ("```python\ncut off", None),
    ],
)
def test_the_last_block_of_python_is_the_program(text: str, program: str | None) -> None:
    assert program_in(text) == program


async def test_rewards_of_the_environment_are_right(tmp_path: Path, namespaces: None) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(DOUBLE) + "\n")
    source = DeepCoderEnvironments(str(file), workers="2", cpu_seconds="2")
    texts = [
        "```python\nprint(int(input()) * 2)\n```",
        "```python\nprint(2)\n```",
        "I do not know.",
        "```python\nwhile 1: pass\n```",
    ]
    try:
        assert len(source) == 1
        assert len(await source.fingerprint()) == 64
        group = await source.open(0, len(texts), 0)
        found = []
        for environment, text in zip(group.environments, texts, strict=True):
            asked = (await environment.reset()).messages[0].content
            assert asked.startswith("Double the number.\n")
            moved = await environment.step(Action(text, np.zeros(1, dtype=np.int64)))
            assert moved.terminated
            found.append((moved.reward, moved.metrics["passed"], moved.metrics["limited"]))
    finally:
        await source.aclose()
    assert found == [(1.0, 1.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]


async def test_it_refuses_to_start_where_programs_cannot_be_isolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "_JAIL", "refusing_jail:run")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(DOUBLE) + "\n")
    source = DeepCoderEnvironments(str(file))
    with pytest.raises(SandboxUnavailable):
        await source.fingerprint()
    await source.aclose()


def test_options_that_do_not_fit_are_refused() -> None:
    for options, says in (
        ({"sandbox": "none"}, "limits-only"),
        ({"tests": "0"}, "tests='0'"),
        ({"cpu_seconds": "-1"}, "cpu_seconds='-1'"),
    ):
        with pytest.raises(ConfigError, match=says):
            DeepCoderEnvironments("p.jsonl", **options)
    with pytest.raises(ConfigError, match="needs problems"):
        DeepCoderEnvironments("")
