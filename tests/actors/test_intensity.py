"""When a supervisor gives up and how long it waits, exactly, in virtual time; and a model over random deaths."""

import random
from collections import deque
from itertools import pairwise
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_kitchen.actors import Actor, ChildSpec, Restarts, SupervisorSpec, supervise
from crucible_kitchen.actors.spec import Window
from crucible_kitchen.errors import CleanupError, MessageQuarantined, TooManyRestarts
from crucible_kitchen.testing.clock import virtual_clock

pytestmark = pytest.mark.anyio
MOST, WITHIN, EPSILON = 3, 10.0, 1e-6


@pytest.fixture
def anyio_backend() -> Any:
    return virtual_clock()


class Mortal(Actor[None, None]):
    """Dies of every message."""

    async def handle(self, message: None) -> None:
        raise RuntimeError("of this message")


async def outlives(deaths: list[float], restarts: Restarts) -> bool:
    """Return whether a supervisor restarts its child after deaths at these times."""
    spec = ChildSpec("a", Mortal, quarantine_after=1)
    try:
        async with supervise(SupervisorSpec("root", (spec,), restarts=restarts)) as tree:
            began = anyio.current_time()
            for at in deaths:
                await anyio.sleep_until(began + at)
                await tree.ref(spec).tell(None)
            await anyio.sleep(1e-3)
            return tree.statistics()[0].epoch == len(deaths) + 1
    except TooManyRestarts:
        return False


@pytest.mark.parametrize(
    ("deaths", "lives"),
    [
        ([0, 1, 2], True),  # R deaths
        ([0, 1, 2, 3], False),  # R + 1
        ([0, 1, 2, WITHIN - EPSILON], False),
        ([0, 1, 2, WITHIN + EPSILON], True),  # the first no longer counts
        ([0, 9, 9.5, WITHIN + EPSILON, 19 - EPSILON], False),  # the window slides: 9 still counts
        ([0, 9, 9.5, WITHIN + EPSILON, 19 + EPSILON], True),
        ([20.0 * i for i in range(20)], True),  # deaths far apart never add up
    ],
)
async def test_more_than_r_deaths_in_p_seconds_and_no_fewer_end_a_supervisor(deaths: list[float], lives: bool) -> None:
    assert await outlives(deaths, Restarts(most=MOST, within=WITHIN, initial=0)) is lives


@pytest.mark.parametrize("most", [0, 1, 5])
async def test_the_r_plus_first_death_ends_it_for_every_r(most: int) -> None:
    restarts = Restarts(most=most, within=WITHIN, initial=0)
    assert await outlives([0.1 * i for i in range(most)], restarts)
    assert not await outlives([0.1 * i for i in range(most + 1)], restarts)


@given(
    gaps=st.lists(st.integers(1, 40).map(lambda n: n / 8), min_size=1, max_size=12),
    most=st.integers(0, 4),
    within=st.integers(1, 80).map(lambda n: n / 8),
)
def test_random_deaths_end_it_exactly_when_a_deque_says_so(gaps: list[float], most: int, within: float) -> None:
    window = Window(Restarts(most=most, within=within, initial=0))
    model: deque[float] = deque()
    now = 0.0
    for gap in gaps:
        now += gap
        model.append(now)
        while model[0] < now - within:
            model.popleft()
        expected = None if len(model) > most else len(model)
        assert window.died("a", now) == expected
        if expected is None:
            return


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gaps=st.lists(st.integers(1, 40).map(lambda n: n / 8), min_size=1, max_size=8), most=st.integers(0, 4))
def test_the_running_supervisor_agrees_with_the_deque(gaps: list[float], most: int) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    model = all(sum(now - WITHIN <= t <= now for t in times) <= most for now in times)
    name, options = virtual_clock()
    restarts = Restarts(most=most, within=WITHIN, initial=0)
    assert anyio.run(outlives, times, restarts, backend=name, backend_options=options) is model


async def births(restarts: Restarts, seed: int, children: int = 1) -> list[list[float]]:
    """Return when each child was born, if every incarnation dies at once of the same message."""
    born: list[list[float]] = [[] for _ in range(children)]

    def birth(i: int) -> Actor[None, None]:
        born[i].append(anyio.current_time() - began)
        return Mortal()

    specs = tuple(
        ChildSpec(f"a{i}", lambda i=i: birth(i), quarantine_after=1000)  # type: ignore[misc]
        for i in range(children)
    )
    began = anyio.current_time()
    with pytest.raises(TooManyRestarts):  # noqa: PT012 - raised as the block is left
        async with supervise(SupervisorSpec("root", specs, restarts=restarts, seed=seed)) as tree:
            for spec in specs:
                await tree.ref(spec).tell(None)
            await anyio.sleep_forever()
    return born


async def test_waits_double_up_to_the_longest() -> None:
    restarts = Restarts(most=6, within=1000, initial=0.5, factor=2, longest=5, jitter=0)
    ((*times,),) = await births(restarts, seed=0)
    assert times == pytest.approx([0, 0.5, 1.5, 3.5, 7.5, 12.5, 17.5], abs=1e-9)


async def test_the_jitter_of_the_waits_is_the_seed_s() -> None:
    restarts = Restarts(most=4, within=1000, initial=1, factor=3, longest=100, jitter=0.5)
    (times,) = await births(restarts, seed=7)
    rng = random.Random("7:root/a0")
    waits = [1.0 * 3**n * (1 - 0.5 * rng.random()) for n in range(4)]
    assert [b - a for a, b in pairwise(times)] == pytest.approx(waits, abs=1e-9)
    assert await births(restarts, seed=7) == [pytest.approx(times, abs=1e-9)]
    assert await births(restarts, seed=8) != [pytest.approx(times, abs=1e-9)]


async def test_a_child_s_wait_counts_its_own_deaths_only() -> None:
    restarts = Restarts(most=4, within=1000, initial=1, factor=2, longest=100, jitter=0)
    first, second = await births(restarts, seed=0, children=2)
    assert first == second == pytest.approx([0, 1, 3], abs=1e-9)


async def test_an_hour_of_waits_takes_no_time() -> None:
    restarts = Restarts(most=200, within=100_000, initial=1, longest=30, jitter=0)
    ((*times,),) = await births(restarts, seed=0)
    assert times[-1] > 3600


async def test_stopping_is_bounded_by_grace_for_each_part_of_it() -> None:
    class Stubborn(Actor[None, None]):
        async def handle(self, message: None) -> None:
            await anyio.sleep_forever()

        async def stop(self) -> None:
            await anyio.sleep_forever()

    spec = ChildSpec("a", Stubborn, grace=7)
    began = 0.0
    with pytest.raises(CleanupError, match="did not stop within 7 s"):  # noqa: PT012
        async with supervise(SupervisorSpec("root", (spec,))) as tree:
            await tree.ref(spec).tell(None)
            began = anyio.current_time()
    assert anyio.current_time() - began == pytest.approx(14)  # to drain, and to stop


async def test_an_actor_that_died_has_its_grace_to_stop_before_the_next_one_follows() -> None:
    class Slow(Mortal):
        async def stop(self) -> None:
            await anyio.sleep_forever()

    spec = ChildSpec("a", Slow, grace=7)
    restarts = Restarts(most=5, initial=0)
    with pytest.raises(CleanupError):  # noqa: PT012 - raised as the block is left
        async with supervise(SupervisorSpec("root", (spec,), restarts=restarts)) as tree:
            began = anyio.current_time()
            with pytest.raises(MessageQuarantined):
                await tree.ref(spec).ask(None)
            assert anyio.current_time() - began == pytest.approx(14)  # it died of the message twice
