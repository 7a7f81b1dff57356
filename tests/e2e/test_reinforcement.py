"""Reinforcement learning on the local executor: after a short supervised warm start, sums are learned from rewards."""

import numpy as np
import pytest

from crucible_kitchen.events import PipelineMeasured, RLStep
from crucible_kitchen.kitchen import Kitchen

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

WARM = {
    "model": "tiny",
    "dataset": "sums",
    "dataset_options": {"difficulty": "1"},
    "batch_size": 32,
    "epochs": 1000,
    "max_steps": 25,
    "register_as": "warm",
}
LEARN = {
    "model": "warm:1",
    "lora_rank": 0,
    "env": "sums",
    "group_size": 8,
    "groups_per_batch": 16,
    "num_rollouts": 140,
    "max_tokens": 6,
    "learning_rate": 5e-4,
    "warmup": 3,
}


@pytest.mark.parametrize("k", [0, 2])
async def test_rewards_rise_from_below_a_half_to_above_nine_tenths(home, k):
    async with Kitchen(home=home) as kitchen:
        await kitchen.run("supervised", WARM)
        run = await kitchen.start("reinforcement", {**LEARN, "advantage": "grpo", "max_staleness": k})
        events = [record.event async for record in run.events()]
        result = await run.wait()
    rewards = [event.reward_mean for event in events if isinstance(event, RLStep)]
    assert np.mean(rewards[:5]) < 0.5
    assert np.mean(rewards[-10:]) > 0.9
    last = [event for event in events if isinstance(event, PipelineMeasured)][-1]
    assert last.ledger["drawn"] == last.ledger["trained"] == 140 * 16
    assert last.staleness_mean <= k
    mismatches = [event.sampler_mismatch for event in events if isinstance(event, RLStep)]
    assert 0 < max(mismatches) <= 1e-5
    assert result.state.registered_model.lineage["base_model"] == "warm:1"
