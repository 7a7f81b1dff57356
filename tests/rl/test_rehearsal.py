"""Rehearsal: what it predicts, from what, and how fast."""

import time

import anyio
import pytest

from crucible_kitchen.config import build_config
from crucible_kitchen.errors import ConfigError, TrainingError
from crucible_kitchen.rl.rehearsal import Latencies, Prices, RehearsalConfig, rehearse
from crucible_kitchen.rl.virtual import run_virtually

STANDARD = Latencies(rollout_mean=0.05, rollout_sigma=1.0, update=0.05)


def config(**values):
    return build_config(RehearsalConfig, {"env": "sums", "groups_per_batch": 8, "num_rollouts": 300} | values)


@pytest.mark.parametrize(
    ("learner", "wanted"), [("streaming", [0.31, 0.90, 0.955, 0.98]), ("batch", [0.24, 0.72, 0.93, 0.97])]
)
def test_it_reproduces_the_known_limits_of_overlap(learner, wanted):
    found = [rehearse(config(max_staleness=k, learner=learner), STANDARD) for k in (0, 1, 2, 4)]
    assert [0.05 / r.step_seconds for r in found] == pytest.approx(wanted, abs=0.03)
    assert all(r.waste == 0 for r in found)
    assert all(sum(r.learner.values()) == pytest.approx(r.seconds) for r in found)


def test_recorded_latencies_are_what_is_drawn_from():
    found = rehearse(config(max_staleness=0, num_rollouts=10), Latencies([2.0], update=1.0, publish=0.5))
    assert found.step_seconds == pytest.approx(2.0 + 1.0 + 0.5)  # all groups arrive at once
    assert found.staleness == {0: 80}


def test_a_price_table_gives_a_cost():
    latencies = Latencies([1.0], update=1.0, tokens=1000.0)
    found = rehearse(config(num_rollouts=10, learner="batch"), latencies, Prices(hour=3600.0, million_tokens=1.0))
    assert found.cost == pytest.approx(10 * 2.0 + 80 * 1000 / 1e6)
    assert rehearse(config(num_rollouts=10), latencies).cost is None


def test_equal_seeds_give_equal_rehearsals():
    one, two, other = (rehearse(config(max_staleness=2, seed=seed), STANDARD) for seed in (1, 1, 2))
    assert one.to_json() == two.to_json() != other.to_json()


def test_impossible_latencies_are_refused():
    for bad in ({"update": -1.0}, {"rollouts": (1.0, float("nan"))}, {"rollout_mean": 0.0}):
        with pytest.raises(ConfigError):
            Latencies(**bad)


def test_simulated_time_passes_at_once_and_a_deadlock_is_told():
    async def sleep():
        began = anyio.current_time()
        await anyio.sleep(86_400.0)
        return anyio.current_time() - began

    real = time.monotonic()
    assert run_virtually(sleep) == pytest.approx(86_400.0)
    assert time.monotonic() - real < 60

    async def wait():
        await anyio.Event().wait()

    with pytest.raises(TrainingError, match="never come"):
        run_virtually(wait)
