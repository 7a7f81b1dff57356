"""A reward model: how it is trained. What each step does stands in ``crucible_kitchen.stages``."""

from crucible_kitchen.config import CheckpointConfig
from crucible_kitchen.stages.evaluation import (
    best_was_kept,
    keep_best,
    report_possible,
    restore_best,
    stop_early,
    write_report,
)
from crucible_kitchen.stages.preference import held_out_given, preference_eval_at_start, preference_eval_due
from crucible_kitchen.stages.preference_data import ComparisonConfig, build_prefs, load_comparisons
from crucible_kitchen.stages.registry import RegisterConfig, check_parent, parent_given, register_model, registry_given
from crucible_kitchen.stages.reward_model import (
    RewardStepConfig,
    evaluate_rewards,
    init_reward_session,
    log_rewards,
    reward_step,
)
from crucible_kitchen.stages.training import (
    batches,
    checkpoint_due,
    epochs,
    log_epoch,
    log_step,
    save_checkpoint,
    save_final,
    training_unsaved,
)
from crucible_kitchen.workflow.nodes import Loop, When, Workflow

__all__ = ["RewardModelConfig", "reward_model"]


class RewardModelConfig(ComparisonConfig, RewardStepConfig, CheckpointConfig, RegisterConfig):
    """Everything that can be set for a reward model."""


evaluate = evaluate_rewards.with_(name="evaluate")
evaluate_before = evaluate_rewards.with_(name="evaluate_before", writes="eval_before")

reward_model = Workflow(
    "reward_model",
    When(parent_given, check_parent),
    load_comparisons.with_(name="load_dataset"),
    init_reward_session,
    build_prefs,
    When(preference_eval_at_start, evaluate_before),
    Loop(
        "epoch",
        epochs,
        Loop(
            "batch",
            batches,
            reward_step,
            log_step,
            log_rewards,
            When(preference_eval_due, evaluate, keep_best),
            When(checkpoint_due, save_checkpoint),
            until=stop_early,
        ),
        log_epoch,
        until=stop_early,
    ),
    When(best_was_kept, restore_best),
    When(training_unsaved, save_checkpoint.with_(name="save_trained")),
    save_final,
    When(held_out_given, evaluate, When(report_possible, write_report)),
    When(registry_given, register_model),
    config=RewardModelConfig,
    description="A pairwise reward model (Bradley-Terry), evaluated and registered",
)
