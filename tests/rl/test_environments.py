"""Environments by name, and the built-in tasks as environments."""

import numpy as np
import pytest

from crucible_kitchen.errors import ConfigError, NotFoundError
from crucible_kitchen.ports.environment import Action, EnvironmentGroup
from crucible_kitchen.rl.environments import environment_entries, open_environment

pytestmark = pytest.mark.anyio


def action(text: str) -> Action:
    return Action(text, np.zeros(1, dtype=np.int64))


async def test_sums_asks_a_question_and_rewards_the_right_answer_only():
    source = open_environment("sums")
    group = await source.open(3, 2, seed=0)
    assert isinstance(group, EnvironmentGroup)
    right, wrong = group.environments
    question = (await right.reset()).messages[0].content
    assert question == (await wrong.reset()).messages[0].content
    a, b = question.rstrip("=").split("+")
    good = await right.step(action(f" {int(a) + int(b)}"))
    bad = await wrong.step(action(f"{int(a) + int(b) + 1}"))
    assert (good.reward, bad.reward) == (1.0, 0.0)
    assert good.terminated
    assert bad.terminated
    assert not good.truncated
    assert list(await group.group_rewards([])) == []
    await group.aclose()


async def test_problems_are_the_same_wherever_they_are_opened_and_held_out_ones_are_others():
    def prompts(source, n):
        return [source._rows[i]["prompt"] for i in range(n)]

    one, two = open_environment("sums", {"difficulty": "1"}), open_environment("sums", {"difficulty": "1"})
    assert prompts(one, len(one)) == prompts(two, len(two))
    assert await one.fingerprint() == await two.fingerprint()
    other = open_environment("sums", {"difficulty": "2"})
    assert await other.fingerprint() != await one.fingerprint()
    held = one.held_out()
    assert held is not None
    assert held.held_out() is None
    assert not set(prompts(held, len(held))) & set(prompts(one, len(one)))


@pytest.mark.parametrize("name", ["sums", "reverse", "sort", "parity"])
def test_every_built_in_task_is_an_environment(name):
    assert name in environment_entries()
    source = open_environment(name)
    assert len(source) > 0
    assert source.space is None
    assert source.name == name


@pytest.mark.parametrize(
    ("env", "options", "error", "says"),
    [
        ("sumz", {}, NotFoundError, "sums"),
        ("sums:hard", {}, ConfigError, "env=sums"),
        ("sums", {"level": "2"}, ConfigError, "difficulty"),
        ("sums", {"difficulty": "0"}, ConfigError, "1 to 9"),
        ("sums", {"size": "many"}, ConfigError, "many"),
        ("sums", {"task": "x"}, ConfigError, "task"),
    ],
)
def test_what_is_no_environment_is_one_clear_error(env, options, error, says):
    with pytest.raises(error) as caught:
        open_environment(env, options)
    assert says in f"{caught.value.message} {caught.value.hint}"
