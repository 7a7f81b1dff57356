"""What is said of an update: its advantages, its passes, its step, and how well rollouts and learning overlap.

Events and numbers only. Read next: ``policy_update.py``; ``crucible_kitchen.rl.pipeline``, which is measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crucible_kitchen.events import AdvantagesComputed, PipelineMeasured, PPOUpdated, RLStep, TrainingStep
from crucible_kitchen.rl.batch import Batch
from crucible_kitchen.rl.learning import TrainableGroup
from crucible_kitchen.rl.trajectories import TrajectoryGroup
from crucible_kitchen.stages.policy_step import PolicyStep
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = ["advantages_event", "log_rl_metrics", "pooled", "report_pass"]


def advantages_event(groups: Sequence[TrainableGroup]) -> AdvantagesComputed:
    """Return what is said of the advantages of an update."""
    a, r = np.concatenate([g.advantages for g in groups]), np.concatenate([g.returns for g in groups])
    return AdvantagesComputed(
        advantage_mean=float(a.mean()),
        advantage_std=float(a.std()),
        return_mean=float(r.mean()),
        return_std=float(r.std()),
        num_steps=len(a),
    )


def pooled(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what several optimizer steps say together: means, and the greatest of what ends in ``_max``."""
    return {
        name: max(r[name] for r in reports) if name.endswith("_max") else float(np.mean([r[name] for r in reports]))
        for name in reports[0]
    }


def report_pass(run: Run, reports: Sequence[Mapping[str, float]], epoch: int, size: int) -> None:
    """Report a pass over ``size`` trajectories: what its steps say together."""
    said = pooled(reports)
    run.emit(PPOUpdated(**{name: said[name] for name in PPOUpdated.measurements}, epoch=epoch, batch_size=size))


@stage(writes="ppo_metrics")
async def log_rl_metrics(
    step: PolicyStep,
    rollouts: Batch[TrajectoryGroup],
    rollout_metrics: dict[str, Any],
    run: Run,
) -> dict[str, float]:
    """Report an update, and how well rollouts and learning overlap."""
    metrics = {**step.policy, "loss": step.loss, "learning_rate": step.learning_rate, "grad_norm": step.grad_norm}
    run.emit(
        RLStep(
            reward_mean=rollout_metrics["reward_mean"],
            policy_loss=metrics["policy_loss"],
            entropy=metrics["entropy"],
            clip_fraction=metrics["clip_fraction"],
            sampler_mismatch=metrics["sampler_mismatch"],
            step=rollouts.update + 1,
        )
    )
    total = rollouts.rollouts.plan.batches
    run.emit(
        TrainingStep(
            step=rollouts.update + 1,
            epoch=0,
            loss=step.loss,
            lr=step.learning_rate,
            tokens_per_sec=step.tokens_per_sec,
            grad_norm=step.grad_norm,
            total_steps=total,
        )
    )
    run.emit(_pipeline_event(rollouts))
    return metrics


def _pipeline_event(batch: Batch[TrajectoryGroup]) -> PipelineMeasured:
    rollouts = batch.rollouts
    seconds = rollouts.seconds()
    ages = rollouts.measured.staleness
    tokens = sum(ages.values())
    waits = rollouts.waiting_for()
    return PipelineMeasured(
        overlap_efficiency=rollouts.efficiency,
        learner_idle_share=seconds["learner"].get("wait", 0.0) / max(rollouts.learner.wall, 1e-9),
        queue_depth=rollouts.depth,
        in_flight=rollouts.in_flight,
        staleness_mean=sum(age * n for age, n in ages.items()) / max(tokens, 1),
        staleness_max=max(ages, default=0),
        waste=rollouts.measured.waste,
        length_bias=rollouts.length_bias,
        step=batch.update + 1,
        slowest=waits[0][0] if waits else -1,
        staleness={str(age): n for age, n in sorted(ages.items())},
        ledger=rollouts.ledger.to_json(),
        learner_seconds=seconds["learner"],
        worker_seconds=seconds["workers"],
    )
