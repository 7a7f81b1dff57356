"""Preference learning: how it runs. What each step does stands in ``crucible_kitchen.stages``."""

from crucible_kitchen.config import CheckpointConfig
from crucible_kitchen.stages.evaluation import (
    best_was_kept,
    keep_best,
    report_possible,
    restore_best,
    stop_early,
    write_report,
)
from crucible_kitchen.stages.preference import (
    PreferenceStepConfig,
    dpo_step,
    evaluate_preferences,
    held_out_given,
    log_dpo,
    preference_eval_at_start,
    preference_eval_due,
)
from crucible_kitchen.stages.preference_data import (
    PreferenceDataConfig,
    build_prefs,
    load_comparisons,
    reference_logprobs,
)
from crucible_kitchen.stages.registry import RegisterConfig, check_parent, parent_given, register_model, registry_given
from crucible_kitchen.stages.training import (
    batches,
    checkpoint_due,
    epochs,
    init_session,
    log_epoch,
    log_step,
    save_checkpoint,
    save_final,
    training_unsaved,
)
from crucible_kitchen.workflow.nodes import Loop, When, Workflow

__all__ = ["PreferenceConfig", "preference"]


class PreferenceConfig(PreferenceStepConfig, PreferenceDataConfig, CheckpointConfig, RegisterConfig):
    """Everything that can be set for preference learning."""


evaluate = evaluate_preferences.with_(name="evaluate")
evaluate_before = evaluate_preferences.with_(name="evaluate_before", writes="eval_before")

preference = Workflow(
    "preference",
    When(parent_given, check_parent),
    load_comparisons.with_(name="load_dataset"),
    init_session,
    build_prefs,
    reference_logprobs,
    When(preference_eval_at_start, evaluate_before),
    Loop(
        "epoch",
        epochs,
        Loop(
            "batch",
            batches,
            dpo_step,
            log_step,
            log_dpo,
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
    config=PreferenceConfig,
    description="Preference learning: DPO and its family, with a frozen reference, evaluation and registration",
)
