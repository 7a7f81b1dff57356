"""Packing: every row once, within the capacity, near the fewest bins that are possible, of even cost."""

from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_kitchen.learner.packing import attention_cost, balance, best_fit_decreasing, lower_bound

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def held(bins):
    return sorted(i for members in bins for i in members)


def full(lengths, bins, capacity):
    return all(len(b) == 1 or sum(lengths[i] for i in b) <= capacity for b in bins)


@given(LENGTHS, st.integers(1, 80))
def test_every_row_is_packed_once_within_the_capacity(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)
    assert held(bins) == list(range(len(lengths)))
    assert full(lengths, bins, capacity)
    assert lower_bound(lengths, capacity) <= len(bins) <= len(lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(30, 60))
def test_searching_over_free_space_equals_searching_over_bins(lengths, capacity):
    free = []
    for length in sorted(lengths, reverse=True):
        room = [k for k, f in enumerate(free) if f >= length]
        best = min(room, key=lambda k: free[k], default=None)
        if best is None:
            free.append(capacity - length)
        else:
            free[best] -= length
    assert len(free) == len(best_fit_decreasing(lengths, capacity))


def fewest(lengths, capacity):
    """The fewest bins, by trying everything."""

    def fits(rest, free):
        if not rest:
            return True
        for k in range(len(free)):
            if free[k] >= rest[0] and free[k] not in free[:k]:
                free[k] -= rest[0]
                if fits(rest[1:], free):
                    return True
                free[k] += rest[0]
        return False

    ordered = sorted(lengths, reverse=True)
    return next(n for n in count() if fits(ordered, [capacity] * n))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=8), st.integers(20, 30))
def test_the_lower_bound_never_exceeds_the_fewest_bins(lengths, capacity):
    least = fewest(lengths, capacity)
    assert lower_bound(lengths, capacity) <= least <= len(best_fit_decreasing(lengths, capacity))


@pytest.mark.parametrize(
    ("draw", "capacity"),
    [
        (lambda rng: np.exp(rng.normal(5.3, 0.8, 5000)), 2048),
        (lambda rng: np.exp(rng.normal(6.5, 1.0, 5000)), 8192),
        (lambda rng: rng.uniform(1, 1024, 5000), 2048),
        (lambda rng: rng.exponential(300, 5000), 2048),
    ],
    ids=["lognormal-0.8", "lognormal-1", "uniform", "exponential"],
)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_lengths_as_datasets_have_them_are_packed_within_a_thousandth_of_the_lower_bound(draw, capacity, seed):
    lengths = np.clip(draw(np.random.default_rng(seed)), 1, capacity).astype(int).tolist()
    bins, bound = best_fit_decreasing(lengths, capacity), lower_bound(lengths, capacity)
    assert len(bins) - bound <= max(1, 0.001 * bound)


@given(LENGTHS, st.integers(60, 200))
def test_balancing_keeps_rows_bins_and_capacity_and_never_makes_the_costliest_bin_costlier(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)
    even = balance(lengths, bins, capacity)
    assert held(even) == held(bins)
    assert len(even) == len(bins)
    assert full(lengths, even, capacity)
    assert all(even)
    assert max(attention_cost(lengths, even), default=0) <= max(attention_cost(lengths, bins), default=0)


def test_balancing_evens_out_the_attention_of_a_batch():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(5.3, 0.8, 256)), 1, 2048).astype(int).tolist()
    bins = best_fit_decreasing(lengths, 4096)
    before, after = (np.array(attention_cost(lengths, b)) for b in (bins, balance(lengths, bins, 4096)))
    assert after.max() == max(lengths) ** 2  # no less is possible: the longest row has a bin to itself
    assert after.std() < 0.5 * before.std()
