"""Mathematical problems and reasoning-gym's: what is right, what is wrong, and what is neither."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.errors import (
    ConfigError,
    DatasetNotFound,
    EmptyDataset,
    EnvironmentFault,
    EnvironmentTimeout,
    MissingExtra,
    RowError,
)
from crucible_kitchen.ports.environment import Action
from crucible_kitchen_environments import math_problems
from crucible_kitchen_environments.answers import boxed, same
from crucible_kitchen_environments.math_problems import MathEnvironments
from crucible_kitchen_environments.reasoning import ReasoningGymEnvironments

pytestmark = pytest.mark.anyio


def action(text: str) -> Action:
    return Action(text, np.zeros(1, dtype=np.int64))


async def rewards(source: Any, *texts: str, problem: int = 0) -> list[float]:
    group = await source.open(problem, len(texts), 0)
    found = []
    for environment, text in zip(group.environments, texts, strict=True):
        await environment.reset()
        transition = await environment.step(action(text))
        assert transition.terminated
        found.append(transition.reward)
    return found


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no", None),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed {7}", "7"),
        (r"\boxed", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_box_whose_braces_balance_is_the_answer(text: str, found: str | None) -> None:
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("0.50", r"\dfrac{2}{4}", True),
        (r"-\frac{1}{2}", "-0.5", True),
        ("1,000", "1000", True),
        ("$ x + 1 $", "x+1", True),
        (r"\text{East}", "east", True),
        ("1", "2", False),
        ("1/0", "1/0", True),
        ("1/0", "0", False),
        ("(3)(4)", "34", False),
        ("(1,2)", "12", False),
        ("", "0", False),
        ("0." + "3" * 50, "1/3", False),
    ],
)
def test_plain_answers_are_compared_exactly_in_one_form(answer: str, reference: str, equal: bool) -> None:
    assert same(answer, reference) is equal


async def test_the_boxed_right_answer_has_reward_1_and_everything_else_0(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", {"problem": "What is 1/4 + 1/4?", "answer": r"\frac{1}{2}"})
    source = MathEnvironments(file)
    assert await rewards(source, r"so \boxed{0.5}", "0.5", r"\boxed{2}", "") == [1.0, 0.0, 0.0, 0.0]
    group = await source.open(0, 1, 0)
    asked = (await group.environments[0].reset()).messages[0].content
    assert asked == "What is 1/4 + 1/4?\nPut the final answer in \\boxed{}."
    assert await rewards(source, r"\boxed{\sqrt{1}/2}") == [0.0]  # equal, but not plainly
    await source.aclose()


async def test_symbolic_equality_is_proved_in_a_worker(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    file = written(tmp_path / "p.jsonl", {"question": "Expand.", "solution": r"It is \boxed{x^2+2x+1}."})
    source = MathEnvironments(file, symbolic="true", timeout="60", workers="1")
    assert await rewards(source, r"\boxed{(x+1)^2}", r"\boxed{(x-1)^2}", r"\boxed{)(}") == [1.0, 0.0, 0.0]
    await source.aclose()


@pytest.mark.parametrize(("function", "error"), [("forever", EnvironmentTimeout), ("broken", EnvironmentFault)])
async def test_a_proof_that_hangs_or_breaks_is_never_a_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: type[Exception]
) -> None:
    pytest.importorskip("math_verify")
    (tmp_path / "proofs.py").write_text(
        "def forever(*_):\n    while True: pass\n\ndef broken(*_):\n    raise ValueError('a row of data')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(math_problems, "_EQUAL", f"proofs:{function}")
    file = written(tmp_path / "p.jsonl", {"problem": "?", "answer": "x"})
    source = MathEnvironments(file, symbolic="true", timeout="0.5", workers="1")
    with pytest.raises(error) as caught:
        await rewards(source, r"\boxed{y}")
    assert "a row of data" not in str(caught.value)
    assert await rewards(source, r"\boxed{x}") == [1.0]
    await source.aclose()


def test_symbolic_equality_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_problems, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra) as caught:
        MathEnvironments("p.jsonl", symbolic="true")
    assert "crucible-kitchen[envs]" in str(caught.value.hint)


async def test_a_twentieth_of_the_problems_is_held_out_whatever_their_order(tmp_path: Path) -> None:
    rows = [{"problem": f"What is {i}?", "answer": str(i)} for i in range(400)]
    one = MathEnvironments(written(tmp_path / "a.jsonl", *rows))
    other = MathEnvironments(written(tmp_path / "b.jsonl", *reversed(rows)))
    held = one.held_out()
    assert held is not None
    assert len(one) + len(held) == 400
    assert 5 <= len(held) <= 40
    assert {q for q, _ in one._problems.all} == {q for q, _ in other._problems.all}
    assert held.held_out() is None
    assert await one.fingerprint() != await held.fingerprint()


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("", EmptyDataset, "no problem"),
        ("no json\n", RowError, "row 0"),
        ("[1]\n", RowError, "row 0"),
        ('{"problem": "?"}\n', RowError, "answer"),
        ('{"answer": "1"}\n', RowError, "problem"),
    ],
)
def test_problems_that_are_none_are_one_clear_error(tmp_path: Path, content: str, error: type, says: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(error, match=says):
        len(MathEnvironments(str(file)))


def test_a_missing_file_and_missing_problems_are_one_clear_error() -> None:
    with pytest.raises(DatasetNotFound, match=r"none\.jsonl"):
        len(MathEnvironments("none.jsonl"))
    with pytest.raises(ConfigError, match="needs problems"):
        MathEnvironments("")


async def test_reasoning_gym_scores_its_own_answers_with_1() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    source = ReasoningGymEnvironments("leg_counting", size="10", workers="1", timeout="60")
    entry = reasoning_gym.create_dataset("leg_counting", seed=0, size=10)[3]
    group = await source.open(3, 1, 0)
    assert (await group.environments[0].reset()).messages[0].content.startswith(entry["question"])
    right = entry["answer"]
    found = await rewards(source, f"<answer>{right}</answer>", right, "<answer>x</answer>", problem=3)
    assert found[:2] == [1.0, 1.0]
    assert found[2] < 0.5
    held = source.held_out()
    assert held is not None
    assert (len(held), held.held_out()) == (100, None)
    await source.aclose()
    await held.aclose()


def test_a_task_that_reasoning_gym_does_not_have_names_its_neighbours() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError) as caught:
        ReasoningGymEnvironments("leg_countin")
    assert "leg_counting" in str(caught.value.hint)
