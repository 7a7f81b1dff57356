"""Measuring a policy: on problems that it is not trained on, greedily; and when that or a checkpoint is due.

Knows the environment port and a session's samplers, nothing of losses. Read next: ``crucible_kitchen.stages.rollout``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import numpy as np
from pydantic import Field

from crucible_kitchen.config import CheckpointConfig, RunConfig
from crucible_kitchen.events import PolicyEvaluated
from crucible_kitchen.ports import TrainingSession
from crucible_kitchen.rl.config import LearnerConfig
from crucible_kitchen.rl.policy import PublishedPolicy
from crucible_kitchen.rl.trajectories import Ticket, TrajectoryGroup
from crucible_kitchen.stages.rollout import EnvironmentPool, ReinforcementPartsConfig, mean_metrics, roller
from crucible_kitchen.types import StepResult
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "EvaluatedPartsConfig",
    "PolicyEvalConfig",
    "evaluate_policy",
    "policy_eval_at_start",
    "policy_eval_due",
    "update_checkpoint_due",
]


class PolicyEvalConfig(RunConfig):
    """When the policy is measured on problems that it is not trained on."""

    eval_size: int = Field(default=100, ge=1)
    """At most this many problems are tried, greedily."""

    eval_every: int = Field(default=0, ge=0)
    """Also evaluate every so many optimizer steps, after the update that reaches them; 0: only at the end."""

    eval_at_start: bool = False
    """Also evaluate before the first update."""


class EvaluatedPartsConfig(ReinforcementPartsConfig, PolicyEvalConfig, CheckpointConfig):
    """What measuring the policy depends on."""


def policy_eval_due(step: StepResult, config: EvaluatedPartsConfig) -> bool:
    """Whether the policy is measured after this update."""
    return _reached(config.eval_every, step, config)


def update_checkpoint_due(step: StepResult, config: EvaluatedPartsConfig) -> bool:
    """Whether the training state is saved after this update."""
    return _reached(config.save_every, step, config)


def _reached(every: int, step: StepResult, config: LearnerConfig) -> bool:
    """Return whether one of an update's optimizer steps is a multiple of ``every``."""
    return bool(every) and step.step // every > (step.step - config.steps_per_update) // every


def policy_eval_at_start(config: PolicyEvalConfig) -> bool:
    """Whether the policy is measured before the first update."""
    return config.eval_at_start


@stage(writes="eval_results")
async def evaluate_policy(
    session: TrainingSession, data: EnvironmentPool, policy: PublishedPolicy[Any], config: PolicyEvalConfig, run: Run
) -> dict[str, Any]:
    """Try held-out problems greedily; where an environment has none, its problems with seeds of their own."""
    held_out = await run_sync(data.source.held_out)
    source = held_out if held_out is not None else data.source
    greedy = replace(data.rules, temperature=0.0, top_p=1.0, top_k=0, learned=False)
    rules = replace(greedy, group_size=1, least=1, horizon=0, seed=config.seed + 1)
    roll = roller(replace(data, source=source), policy, session, rules)
    count = min(config.eval_size, await run_sync(lambda: len(source)))
    groups: list[TrajectoryGroup | None] = [None] * count
    slots = anyio.CapacityLimiter(32)

    async def attempt(index: int) -> None:
        async with slots:
            groups[index] = await roll(Ticket(index, index))

    async with anyio.create_task_group() as tasks:
        for index in range(count):
            tasks.start_soon(attempt, index)
    if held_out is not None:
        await held_out.aclose()
    return _evaluated([g for g in groups if g is not None], session, run, held_out=held_out is not None)


def _evaluated(
    groups: Sequence[TrajectoryGroup], session: TrainingSession, run: Run, *, held_out: bool
) -> dict[str, Any]:
    trajectories = [t for group in groups for t in group.trajectories]
    rewards = np.array([t.reward for t in trajectories])
    mean, std = (float(rewards.mean()), float(rewards.std())) if len(rewards) else (float("nan"), float("nan"))
    run.emit(
        PolicyEvaluated(
            reward_mean=mean,
            reward_std=std,
            episodes=len(rewards),
            step=session.position,
            held_out=held_out,
            label=run.path.rpartition("/")[2],
        )
    )
    return {
        "reward_mean": mean,
        "reward_std": std,
        "episodes": len(rewards),
        "failed": len(groups) - len(trajectories),
        "held_out": held_out,
        "metrics": mean_metrics([t.metrics for t in trajectories]),
        "step": session.position,
        "synthetic": session.capabilities.synthetic,
    }
