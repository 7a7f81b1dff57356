"""Reinforcement learning: how it runs. What each step does stands in ``crucible_kitchen.stages``."""

from crucible_kitchen.stages.curves import keep_curves, write_policy_report
from crucible_kitchen.stages.policy_evaluation import (
    EvaluatedPartsConfig,
    evaluate_policy,
    policy_eval_at_start,
    policy_eval_due,
    update_checkpoint_due,
)
from crucible_kitchen.stages.policy_reports import log_rl_metrics
from crucible_kitchen.stages.policy_step import UpdateConfig
from crucible_kitchen.stages.policy_update import (
    assemble_rl_batch,
    compute_advantages,
    ppo_update,
    streaming_update,
    streams,
)
from crucible_kitchen.stages.registry import RegisterConfig, check_parent, parent_given, register_model, registry_given
from crucible_kitchen.stages.rollout import (
    do_rollout,
    init_policy_session,
    log_rollouts,
    open_policy,
    publish_policy,
    rollout_feed,
)
from crucible_kitchen.stages.scoring import ScoredConfig, build_scored_env_group
from crucible_kitchen.stages.training import save_checkpoint, save_final, training_unsaved
from crucible_kitchen.workflow.nodes import Stream, When, Workflow

__all__ = ["ReinforcementConfig", "reinforcement"]


class ReinforcementConfig(UpdateConfig, EvaluatedPartsConfig, RegisterConfig, ScoredConfig):
    """Everything that can be set for reinforcement learning."""


evaluate = evaluate_policy.with_(name="evaluate")
evaluate_before = evaluate_policy.with_(name="evaluate_before", writes="eval_before")

reinforcement = Workflow(
    "reinforcement",
    When(parent_given, check_parent),
    init_policy_session,
    build_scored_env_group,
    open_policy,
    When(policy_eval_at_start, evaluate_before),
    Stream(
        "rollouts",
        do_rollout,
        When(streams, streaming_update, otherwise=(compute_advantages, assemble_rl_batch, ppo_update)),
        log_rollouts,
        publish_policy,
        log_rl_metrics,
        keep_curves,
        When(policy_eval_due, evaluate),
        When(update_checkpoint_due, save_checkpoint),
        over=rollout_feed,
        draws="ticket",
    ),
    When(training_unsaved, save_checkpoint.with_(name="save_trained")),
    save_final,
    evaluate,
    write_policy_report,
    When(registry_given, register_model),
    config=ReinforcementConfig,
    description="Reinforcement learning: env groups, advantages, PPO and its kin",
)
