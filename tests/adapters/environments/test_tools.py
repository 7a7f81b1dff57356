"""Several turns with a tool, and rewards that compare a group's members."""

import numpy as np
import pytest

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.ports.environment import Action, Episode
from crucible_kitchen_environments.tools import CalculatorEnvironments, calculate

pytestmark = pytest.mark.anyio


def action(text: str) -> Action:
    return Action(text, np.zeros(1, dtype=np.int64))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"),
        ("1/3+1/6", "1/2"),
        ("-(2-5)", "3"),
        ("0.1+0.2", "3/10"),
        ("1/0", "error: division by zero"),
        ("__import__('os')", "error: not understood"),
        ("2**9999", "error: not understood"),
        ("True", "error: not understood"),
        ("1" * 101, "error: too long"),
        ("", "error: not understood"),
    ],
)
def test_the_calculator_is_exact_and_knows_arithmetic_only(expression: str, value: str) -> None:
    assert calculate(expression) == value


async def test_the_tool_answers_until_the_policy_does() -> None:
    source = CalculatorEnvironments("", calls="2")
    group = await source.open(5, 1, 0)
    (member,) = group.environments
    opening = await member.reset()
    expression = opening.messages[0].content.split(" = ")[0]
    called = await member.step(action(f"<calc>{expression}"))  # the stop text is not part of it
    assert not called.terminated
    assert called.observation is not None
    assert called.observation.messages[0].role == "tool"
    value = called.observation.messages[0].content.strip()
    answered = await member.step(action(f"<answer>{value}</answer>"))
    assert (answered.reward, answered.terminated) == (1.0, True)
    assert answered.metrics == {"calls": 1.0, "correct": 1.0}


async def test_a_wrong_answer_and_none_have_no_reward_and_too_many_calls_cut_the_episode() -> None:
    group = await CalculatorEnvironments("", calls="1").open(0, 3, 0)
    wrong, neither, caller = group.environments
    for member in group.environments:
        await member.reset()
    assert (await wrong.step(action("<answer>x</answer>"))).reward == 0.0
    assert (await neither.step(action("hm"))).terminated
    assert not (await caller.step(action("<calc>1</calc>"))).truncated
    cut = await caller.step(action("<calc>1</calc>"))
    assert (cut.terminated, cut.truncated) == (False, True)


async def test_the_group_compares_its_right_answers() -> None:
    group = await CalculatorEnvironments("", bonus="1").open(0, 4, 0)
    episodes = [
        Episode(0, 1.0, (), {"correct": 1.0, "calls": 2.0}),
        Episode(1, 1.0, (), {"correct": 1.0, "calls": 1.0}),
        Episode(3, 0.0, (), {"correct": 0.0, "calls": 0.0}),
    ]
    assert list(await group.group_rewards(episodes)) == [0.0, 1.0, 0.0]


async def test_held_out_problems_are_others() -> None:
    source = CalculatorEnvironments("", size="50")
    held = source.held_out()
    assert held is not None
    assert held.held_out() is None
    assert await held.fingerprint() != await source.fingerprint()
    with pytest.raises(IndexError):
        await source.open(50, 1, 0)
    with pytest.raises(ConfigError, match="no tasks"):
        CalculatorEnvironments("x")
