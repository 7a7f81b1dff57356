"""CartPole is solved: a policy over observations learns by real GAE and PPO in real environments."""

from pathlib import Path

import pytest

from crucible_kitchen import Kitchen

pytest.importorskip("gymnasium")
pytestmark = [pytest.mark.e2e, pytest.mark.anyio]


async def test_cartpole_is_solved_on_episodes_that_were_not_trained_on(home: Path) -> None:
    config = {
        "model": "mlp",
        "env": "gymnasium:CartPole-v1",
        "env_options": {"isolation": "none"},
        "lora_rank": 0,
        "group_size": 8,
        "groups_per_batch": 1,
        "horizon": 256,
        "num_rollouts": 48,
        "gamma": 0.98,
        "gae_lambda": 0.8,
        "ppo_epochs": 10,
        "minibatches": 8,
        "learning_rate": 1e-3,
        "beta2": 0.999,
        "eps": 1e-5,
        "grad_clip_norm": 0.5,
        "normalize": "batch",
        "eval_at_start": True,
        "eval_size": 50,
    }
    result = await Kitchen(home=home).run("reinforcement", config)
    assert result.state.eval_before["reward_mean"] < 100
    assert result.state.eval_results["reward_mean"] >= 475
    assert result.state.eval_results["held_out"]
    assert result.state.ppo_metrics["value_loss"] > 0
