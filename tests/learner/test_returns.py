"""Returns: the published recursion, its slow definition, the trap of truncation, holes, KL as a reward."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_kitchen.learner.returns import discounted_returns, gae, kl_shaped_advantages, kl_shaped_rewards

GOLDEN = json.loads((Path(__file__).parent / "golden" / "returns.json").read_text(encoding="utf-8"))


def slow_gae(r, v, terminated, truncated, bootstrap, mask, gamma, lam):
    """Advantages of one row by their definition, a sum of errors over the rest of each trajectory; O(T^2)."""
    trajectories, steps = [], []
    for t in range(len(r)):
        if mask[t]:
            steps.append(t)
        if terminated[t] or truncated[t] or t == len(r) - 1:
            trajectories.append((steps, 0.0 if terminated[t] else bootstrap[t]))
            steps = []
    found = np.zeros(len(r))
    for steps, after in trajectories:
        following = [*(v[s] for s in steps[1:]), after][: len(steps)]
        errors = [r[s] + gamma * f - v[s] for s, f in zip(steps, following, strict=True)]
        for i, s in enumerate(steps):
            found[s] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(steps)))
    return found


@st.composite
def paths(draw):
    """Rewards, values, ends and holes of a few rows; the last steps may be open."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ends, holes = draw(st.sampled_from([0, 0.02, 0.3, 1])), draw(st.sampled_from([0, 0.2, 0.9]))
    mask = rng.random((rows, length)) >= holes
    values, bootstrap = rng.normal(size=(2, rows, length))
    rewards = np.where(mask, rng.normal(size=(rows, length)), 0.0)
    terminated, truncated = (rng.random((rows, length)) < ends / 2 for _ in range(2))
    return rewards, values, terminated, truncated, bootstrap, mask


shares = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@settings(max_examples=200, deadline=None)
@given(paths(), shares, shares)
def test_advantages_equal_their_definition_whatever_ends_and_holes(path, gamma, lam):
    rewards, values, terminated, truncated, bootstrap, mask = path
    options = {"gamma": gamma, "terminated": terminated, "truncated": truncated, "bootstrap": bootstrap, "mask": mask}
    found, targets = gae(rewards, values, lam=lam, **options)
    expected = [slow_gae(*row, gamma, lam) for row in zip(*path, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(targets, found + values)
    sums = [slow_gae(r, 0 * v, *row, gamma, 1.0) for r, v, *row in zip(*path, strict=True)]
    np.testing.assert_allclose(discounted_returns(rewards, **options), sums, rtol=0, atol=1e-10)


@given(paths(), shares)
def test_lambda_one_gives_returns_minus_values_and_lambda_zero_the_one_step_errors(path, gamma):
    rewards, values, terminated, truncated, bootstrap, _ = path
    options = {"gamma": gamma, "terminated": terminated, "truncated": truncated, "bootstrap": bootstrap}
    returns = discounted_returns(rewards, **options)
    np.testing.assert_allclose(gae(rewards, values, lam=1.0, **options).returns, returns, rtol=0, atol=1e-10)
    ended = terminated | truncated
    ended[:, -1] = True
    following = np.where(ended, np.where(terminated, 0.0, bootstrap), np.roll(values, -1, axis=-1))
    errors = rewards + gamma * following - values
    np.testing.assert_allclose(gae(rewards, values, lam=0.0, **options).advantages, errors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"gamma={case['gamma']}")
def test_advantages_equal_torchrl_s(case):
    inputs = {name: np.array(x) for name, x in GOLDEN["inputs"].items()}
    found = gae(inputs.pop("rewards"), inputs.pop("values"), gamma=case["gamma"], lam=case["lam"], **inputs)
    np.testing.assert_allclose(found.advantages, case["advantages"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.returns, case["returns"], rtol=0, atol=1e-12)


def test_a_truncation_is_not_a_termination():
    ones, tens = np.ones(4), np.full(4, 10.0)
    last = [False, False, False, True]
    options = {"gamma": 0.99, "lam": 0.95, "bootstrap": 10.0}
    cut = gae(ones, tens, terminated=[False] * 4, truncated=last, **options).advantages
    over = gae(ones, tens, terminated=last, **options).advantages
    np.testing.assert_allclose(cut, [3.2913, 2.5425, 1.7465, 0.9], atol=5e-5)
    np.testing.assert_allclose(over, [-4.9447, -6.2144, -7.5645, -9.0], atol=5e-5)


def test_what_follows_an_end_does_not_reach_back():
    r, v = np.array([1.0, 1, 1, 1, 0]), np.array([10.0, 10, 10, 10, 3])
    cut = [False, False, False, True, False]
    whole = gae(r, v, gamma=0.99, lam=0.95, terminated=[False] * 5, truncated=cut, bootstrap=10.0).advantages
    alone = gae(r[:4], v[:4], gamma=0.99, lam=0.95, terminated=[False] * 4, bootstrap=10.0).advantages
    np.testing.assert_array_equal(whole[:4], alone)


def test_tool_tokens_are_removed_first():
    rewards = [0.0] * 7 + [1.0]
    values, mask = [0.2, 0.3, 0.9, 0.9, 0.9, 0.5, 0.6, 0.7], np.array([1, 1, 0, 0, 0, 1, 1, 1], bool)
    found, targets = gae(rewards, values, gamma=0.99, lam=0.95, terminated=[False] * 7 + [True], mask=mask)
    np.testing.assert_allclose(found, [0.676, 0.615, 0, 0, 0, 0.447, 0.375, 0.3], atol=5e-4)
    np.testing.assert_array_equal(targets[~mask], 0.9)


@given(st.integers(1, 300), st.integers(0, 300))
def test_one_joined_array_gives_what_its_trajectories_give(first, second):
    rng = np.random.default_rng(first * 1000 + second)
    r, v = rng.normal(size=(2, first + second))
    last = np.zeros(first + second, bool)
    last[first - 1] = last[-1] = True
    whole = gae(r, v, gamma=0.99, lam=0.95, terminated=last).advantages
    parts = [
        gae(r[s], v[s], gamma=0.99, lam=0.95, terminated=last[s]).advantages for s in (slice(first), slice(first, None))
    ]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [127, 128, 129, 1023, 1025, 8192, 20_001])
def test_long_paths_equal_the_plain_recursion(length):
    rng = np.random.default_rng(length)
    r, v, bootstrap = rng.normal(size=(3, length))
    terminated, truncated = (rng.random(length) < 0.01 for _ in range(2))
    options = {"gamma": 0.99, "terminated": terminated, "truncated": truncated, "bootstrap": bootstrap}
    following, last, expected = 0.0, 0.0, np.zeros(length)
    for t in range(length - 1, -1, -1):
        ended = terminated[t] or truncated[t] or t == length - 1
        following = 0.0 if terminated[t] else bootstrap[t] if ended else v[t + 1]
        expected[t] = last = r[t] + 0.99 * following - v[t] + (0.0 if ended else 0.99 * 0.95 * last)
    np.testing.assert_allclose(gae(r, v, lam=0.95, **options).advantages, expected, rtol=0, atol=1e-12)


def test_bad_input_is_refused_with_what_to_do():
    r, v, flags = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3), bool)
    good = {"gamma": 0.9, "lam": 0.9, "terminated": flags, "bootstrap": 0.0}
    with pytest.raises(ValueError, match="bootstrap"):
        gae(r, v, **good | {"bootstrap": None})
    with pytest.raises(ValueError, match="lam must be"):
        gae(r, v, **good | {"lam": 1.5})
    with pytest.raises(ValueError, match=r"values have shape \(3,\)"):
        gae(r, v[0], **good)
    with pytest.raises(ValueError, match="terminated has shape"):
        gae(r, v, **good | {"terminated": flags[0]})
    with pytest.raises(ValueError, match="bootstrap has shape"):
        gae(r, v, **good | {"bootstrap": v[0]})
    with pytest.raises(ValueError, match="last sampled token"):
        gae(r + 1, v, **good, mask=flags)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            gae(r, v + bad, **good)
    with pytest.raises(ValueError, match="no axis of time"):
        gae(1.0, 1.0, **good)


def test_what_is_not_read_may_be_anything():
    nothing = [np.nan, np.nan, np.nan]
    found = gae([0, 0, 1], [0.5] * 3, gamma=1, lam=1, terminated=[False, False, True], bootstrap=nothing)
    np.testing.assert_array_equal(found.returns, [1, 1, 1])


def test_no_steps_give_no_advantages():
    assert gae([], [], gamma=1, lam=1, terminated=[]).advantages.shape == (0,)
    assert discounted_returns(np.zeros((2, 0)), gamma=1, terminated=np.zeros((2, 0))).shape == (2, 0)


def test_the_kl_penalty_is_taken_from_the_reward_of_each_sampled_token():
    p, q, mask = np.array([-1.0, -2, -3]), np.array([-1.5, -1, -9]), np.array([True, True, False])
    found = kl_shaped_rewards([0, 1, 5], p, q, coefficient=0.1, mask=mask)
    np.testing.assert_allclose(found, [-0.05, 1.1, 5])


def test_the_centred_penalty_adds_nothing_to_the_sum_of_advantages():
    rng = np.random.default_rng(0)
    p, q, a = rng.normal(size=(3, 5, 20))
    mask = rng.random((5, 20)) < 0.7
    found = kl_shaped_advantages(a, p, q, coefficient=0.3, mask=mask)
    assert abs((found - a)[mask].sum()) < 1e-12
    np.testing.assert_array_equal(found[~mask], a[~mask])
    d = p - q
    np.testing.assert_allclose(found[mask], (a + 0.3 * (d[mask].mean() - d))[mask], rtol=0, atol=1e-12)


def test_a_discounted_penalty_sums_what_later_tokens_pay():
    a, q = np.zeros(3), np.zeros(3)
    found = kl_shaped_advantages(a, [1.0, 2, 6], q, coefficient=1.0, discount=0.5)
    np.testing.assert_allclose(found, [2 + 0.5 * (1 - 1.5), 1 - 1.5, -3])
