"""When answers leave: never dearer than twice what could be had by knowing when the others will come."""

import math
from itertools import pairwise

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_kitchen.service import departures
from crucible_kitchen.service.departures import Departure

LONG = 1e9
times = st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=9).map(sorted)


def cost_of_the_rule(arrivals: list[float], exchange: float, others: int) -> float:
    """Exchanges and waiting of answers that arrive at these times, each told by the rule."""
    cost, departure = 0.0, Departure()
    waiting: list[float] = []
    for now in [*arrivals, math.inf]:
        if waiting and departure.leaves <= now:
            cost += exchange * others + sum(departure.leaves - came for came in waiting)
            waiting, departure = [], Departure()
        if now < math.inf:
            departure.add(now, LONG, others)
            waiting.append(now)
    return cost


def least_cost(arrivals: list[float], exchange: float, others: int) -> float:
    """The least there is when all arrivals are known: answers leave when the last of them came."""
    best = [0.0]
    for end in range(1, len(arrivals) + 1):
        groups = (arrivals[start:end] for start in range(end))
        best.append(min(b + exchange * others + sum(g[-1] - t for t in g) for b, g in zip(best, groups, strict=False)))
    return best[-1]


@given(times, st.floats(0.01, 3), st.integers(1, 64))
def test_the_rule_costs_at_most_twice_the_least(arrivals, exchange, others):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(departures, "_EXCHANGE", exchange)
        spent = cost_of_the_rule(arrivals, exchange, others)
    assert spent <= 2 * least_cost(arrivals, exchange, others) * (1 + 1e-9)


@given(times, st.lists(st.floats(0, 5), min_size=9, max_size=9), st.integers(1, 64))
def test_no_answer_waits_longer_than_it_was_computed_and_another_only_brings_the_departure_forward(
    arrivals, took, others
):
    departure, leaving = Departure(), []
    for now, seconds in zip(arrivals, took, strict=False):
        if leaving and now >= leaving[-1]:
            break
        departure.add(now, seconds, others)
        leaving.append(departure.leaves)
        assert departure.leaves <= now + seconds
    assert all(later <= before + 1e-9 for before, later in pairwise(leaving))


def test_the_last_answer_leaves_at_once():
    departure = Departure()
    departure.add(5.0, LONG, 3)
    assert departure.leaves == 5.0 + 3 * departures._EXCHANGE
    departure.add(5.0, LONG, 0)
    assert departure.leaves == 5.0


@pytest.mark.anyio
async def test_all_who_wait_are_woken_by_an_answer_that_brings_the_departure_forward(monkeypatch):
    monkeypatch.setattr(departures, "_EXCHANGE", LONG)
    departure, left = Departure(), []

    async def wait():
        await departure.wait()
        left.append(True)

    with anyio.fail_after(10):
        departure.add(anyio.current_time(), LONG, 1)
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            group.start_soon(wait)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert not left
            departure.add(anyio.current_time(), LONG, 0)
    assert left == [True, True]
