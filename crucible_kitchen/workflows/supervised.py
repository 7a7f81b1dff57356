"""Supervised fine-tuning: how it runs. What each step does stands in ``crucible_kitchen.stages``."""

from crucible_kitchen.config import CheckpointConfig
from crucible_kitchen.stages.data import SupervisedDataConfig, build_dataset, load_dataset
from crucible_kitchen.stages.evaluation import (
    best_was_kept,
    eval_at_start,
    eval_due,
    evaluate,
    evaluator_given,
    keep_best,
    restore_best,
    stop_early,
    write_report,
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
    train_step,
    training_unsaved,
)
from crucible_kitchen.workflow.nodes import Loop, When, Workflow

__all__ = ["SupervisedConfig", "supervised"]


class SupervisedConfig(SupervisedDataConfig, CheckpointConfig, RegisterConfig):
    """Everything that can be set for supervised fine-tuning."""


evaluate_before = evaluate.with_(name="evaluate_before", writes="eval_before")

supervised = Workflow(
    "supervised",
    When(parent_given, check_parent),
    load_dataset,
    init_session,
    build_dataset,
    When(eval_at_start, evaluate_before),
    Loop(
        "epoch",
        epochs,
        Loop(
            "batch",
            batches,
            train_step,
            log_step,
            When(eval_due, evaluate, keep_best),
            When(checkpoint_due, save_checkpoint),
            until=stop_early,
        ),
        log_epoch,
        until=stop_early,
    ),
    When(best_was_kept, restore_best),
    When(training_unsaved, save_checkpoint.with_(name="save_trained")),
    save_final,
    When(evaluator_given, evaluate, write_report),
    When(registry_given, register_model),
    config=SupervisedConfig,
    description="Supervised fine-tuning with evaluation and registration",
)
