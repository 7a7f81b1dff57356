"""Distillation: how it runs. What each step does stands in ``crucible_kitchen.stages``."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from crucible_kitchen.config import CheckpointConfig, EvalConfig, RunConfig
from crucible_kitchen.stages.data import SupervisedDataConfig, build_dataset, load_dataset
from crucible_kitchen.stages.distillation import (
    DistillationStepConfig,
    distill_step,
    evaluate_teacher,
    log_distillation,
)
from crucible_kitchen.stages.distillation_data import DistillationDataConfig, build_prompts
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
from crucible_kitchen.stages.lessons import teacher_lessons
from crucible_kitchen.stages.registry import RegisterConfig, check_parent, parent_given, register_model, registry_given
from crucible_kitchen.stages.teachers import open_teachers, teacher_untold
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
from crucible_kitchen.tasks import TASKS
from crucible_kitchen.workflow.nodes import Loop, When, Workflow
from crucible_kitchen.workflow.stage import Retry

__all__ = ["DistillationConfig", "TeacherTrainingConfig", "distillation", "train_teacher"]

_TEACHER_DEFAULTS: Mapping[str, Any] = {"epochs": 6, "learning_rate": 2e-3, "warmup": 0.05}
_SHARED = ("model", "dataset", "dataset_size", "dataset_options", "seed")


class TeacherTrainingConfig(SupervisedDataConfig, CheckpointConfig):
    """How a teacher is trained before it teaches."""

    @model_validator(mode="after")
    def _is_evaluated_as_the_student_is(self) -> Self:
        own = EvalConfig.model_fields.keys() - RunConfig.model_fields.keys()
        given = sorted(key for key in own if getattr(self, key) != EvalConfig.model_fields[key].default)
        if given:
            raise ValueError(f"teacher_training.{given[0]}: the teacher is evaluated with the config of the student")
        return self


class DistillationConfig(DistillationDataConfig, DistillationStepConfig, CheckpointConfig, RegisterConfig):
    """Everything that can be set for distillation."""

    teacher_training: TeacherTrainingConfig
    """How a teacher is trained if none was named: keys of supervised fine-tuning. Unset: six epochs of this config's
    model on this config's dataset."""

    @model_validator(mode="before")
    @classmethod
    def _teacher_like_student(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = values.get("teacher_training", {})
        if not isinstance(given, Mapping):
            return values
        shared = {key: values[key] for key in _SHARED if key in values}
        return {**values, "teacher_training": {**_TEACHER_DEFAULTS, **shared, **given}}

    @model_validator(mode="after")
    def _somebody_teaches(self) -> Self:
        if not self.specs and self.dataset not in TASKS:
            raise ValueError("teacher is missing: write teacher=MODEL, a model, a registered version or a served one")
        return self


train_teacher = Workflow(
    "train_teacher",
    load_dataset,
    init_session,
    build_dataset,
    Loop(
        "epoch",
        epochs,
        Loop("batch", batches, train_step, log_step, When(checkpoint_due, save_checkpoint)),
        log_epoch,
    ),
    When(training_unsaved, save_checkpoint.with_(name="save_trained")),
    save_final.with_(writes="teacher_weights"),
    config=TeacherTrainingConfig,
    returns=("teacher_weights",),
    description="A teacher learns from the references, where none was named",
)

patiently = Retry(attempts=5)  # a served teacher may be busy; a step that is tried again samples the same answers
evaluate_before = evaluate.with_(name="evaluate_before", writes="eval_before")

distillation = Workflow(
    "distillation",
    When(parent_given, check_parent),
    When(teacher_untold, train_teacher.at("teacher_training")),
    load_dataset,
    open_teachers,
    init_session,
    build_prompts,
    teacher_lessons.with_(retry=patiently),
    When(evaluator_given, evaluate_teacher),
    When(eval_at_start, evaluate_before),
    Loop(
        "epoch",
        epochs,
        Loop(
            "batch",
            batches,
            distill_step.with_(retry=patiently),
            log_step,
            log_distillation,
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
    config=DistillationConfig,
    description="Distillation: a student learns from teachers, on its own samples or on theirs",
)
