"""Group-relative advantages: each convention's numbers, equal rewards, refusals; whitening in its four ranges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crucible_kitchen.learner.advantages import (
    STD_CONVENTIONS,
    Moments,
    centred,
    dr_grpo,
    grpo,
    maxrl,
    normalize,
    rloo,
    whiten,
)

METHODS = [centred, dr_grpo, rloo, maxrl, *(lambda r, std=std: grpo(r, std=std) for std in STD_CONVENTIONS)]
rewards = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.floats(0, 10))


def test_one_right_answer_of_four():
    r = [1, 0, 0, 0]
    np.testing.assert_allclose(grpo(r, std="openrlhf"), [1.5, -0.5, -0.5, -0.5], atol=1e-8)
    np.testing.assert_allclose(grpo(r, std="open_instruct"), [3**0.5, *[-(3**-0.5)] * 3], atol=1e-7)
    np.testing.assert_allclose(rloo(r), [1, -1 / 3, -1 / 3, -1 / 3], atol=1e-15)
    np.testing.assert_allclose(maxrl(r), [3, -1, -1, -1], atol=1e-15)
    np.testing.assert_array_equal(centred(r), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_array_equal(dr_grpo(r), centred(r))


@settings(deadline=None)  # it imports torch
@given(rewards)
def test_each_convention_divides_as_its_implementation_does(r):
    torch = pytest.importorskip("torch")
    t = torch.from_numpy(r)
    mean, unbiased = t.mean(-1, keepdim=True), t.std(-1, keepdim=True)
    biased = t.std(-1, keepdim=True, correction=0)
    expected = {
        "trl": (t - mean) / (unbiased + 1e-4),
        "verl": (t - mean) / (unbiased + 1e-6),
        "openrlhf": (t - mean) / (unbiased + 1e-9),
        "open_instruct": (t - mean) / (biased + 1e-8),
        "rllm": (t - mean) / (biased + 1e-6),
    }
    varied = np.ptp(r, axis=-1) > 1e-3  # below, rounding of the mean is what the others divide
    for name, value in expected.items():
        np.testing.assert_allclose(grpo(r, std=name)[varied], value.numpy()[varied], rtol=0, atol=1e-10)
    others = (t.sum(-1, keepdim=True) - t) / (t.shape[-1] - 1)
    np.testing.assert_allclose(rloo(r)[varied], (t - others).numpy()[varied], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 3, 8, 1000])
def test_equal_rewards_give_exactly_nothing(method, size):
    for reward in (0.0, 0.1, 0.2, 0.3, 0.7, 1 / 3, 1e-300, 1e9):
        assert not method(np.full(size, reward)).any()


@given(rewards)
def test_groups_do_not_know_of_each_other(r):
    for method in METHODS:
        np.testing.assert_array_equal(method(r), [method(group) for group in r])
        np.testing.assert_array_equal(method(r[::-1])[::-1], method(r))


def test_what_cannot_be_compared_is_refused():
    for method in METHODS:
        with pytest.raises(ValueError, match="two or more"):
            method([1.0])
        with pytest.raises(ValueError, match="not finite"):
            method([1.0, np.nan])
    with pytest.raises(ValueError, match="0 or more"):
        maxrl([1.0, -1.0])
    with pytest.raises(ValueError, match="no convention 'std'"):
        grpo([1.0, 2.0], std="std")


def test_whitening_takes_the_mask_s_mean_and_unbiased_variance():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(4, 7)), rng.random((4, 7)) < 0.6
    chosen = x[mask]
    for form, scale in (
        ("verl", np.sqrt(chosen.var(ddof=1) + 1e-8)),
        ("cleanrl", chosen.std(ddof=1) + 1e-8),
    ):
        found = whiten(x, mask, form=form)
        np.testing.assert_allclose(found[mask], (chosen - chosen.mean()) / scale, rtol=0, atol=1e-12)
        assert not found[~mask].any()


@pytest.mark.parametrize("x", [[], [3.0], [0.1] * 10, [0.7] * 7])
def test_what_does_not_vary_whitens_to_exactly_nothing(x):
    assert not whiten(x).any()
    assert not normalize([x], "running")[0][0].any()


def test_each_range_of_normalisation():
    rng = np.random.default_rng(1)
    groups = [rng.normal(size=shape) for shape in ((3, 4), (2, 9), (5,))]
    masks = [rng.random(g.shape) < 0.7 for g in groups]
    none, group, batch, running = (
        normalize(groups, how, masks=masks)[0] for how in ("none", "group", "batch", "running")
    )
    together = np.concatenate([g[m] for g, m in zip(groups, masks, strict=True)])
    scale = np.sqrt(together.var(ddof=1) + 1e-8)
    for i, (g, m) in enumerate(zip(groups, masks, strict=True)):
        np.testing.assert_array_equal(none[i], np.where(m, g, 0))
        np.testing.assert_allclose(group[i], whiten(g, m), atol=1e-12)
        np.testing.assert_allclose(batch[i][m], (g[m] - together.mean()) / scale, atol=1e-12)
        assert not running[i][~m].any()
    np.testing.assert_allclose(running[-1], batch[-1], atol=1e-12)  # by then it has seen the whole batch
    with pytest.raises(ValueError, match="differ in shape"):
        normalize(groups, "batch", masks=masks[:2])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_running_moments_do_not_depend_on_how_values_arrive_together(sizes):
    values = np.random.default_rng(sum(sizes)).normal(3.0, 2.0, size=sum(sizes))
    groups = np.split(values, np.cumsum(sizes)[:-1])
    seen, found = Moments(), []
    for g in groups:  # as a streaming learner does
        (one,), seen = normalize([g], "running", moments=seen)
        found.append(one)
    at_once, moments = normalize(groups, "running")
    assert seen == moments
    for a, b in zip(found, at_once, strict=True):
        np.testing.assert_array_equal(a, b)
    if len(values) > 1:
        np.testing.assert_allclose([seen.mean, seen.variance], [values.mean(), values.var(ddof=1)], rtol=1e-12)


def test_a_number_that_is_not_finite_is_refused():
    for how in ("group", "batch", "running"):
        with pytest.raises(ValueError, match="not finite"):
            normalize([[1.0, np.inf]], how)
