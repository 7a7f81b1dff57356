"""Preference stages: optimizer steps on comparisons, and how well held-out ones are told apart.

They know a session and the learner's losses, which any backend can use. Read next:
``crucible_kitchen.learner.preference``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crucible_kitchen.config import HeldOutConfig, OptimConfig
from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.events import DpoEvaluated, DpoStep
from crucible_kitchen.learner.hyperparams import recommended_learning_rate
from crucible_kitchen.learner.preference import KTO, kto_reference_point
from crucible_kitchen.ports import TrainingClient, TrainingSession
from crucible_kitchen.stages.data import Batch
from crucible_kitchen.stages.preference_data import (
    ANSWERS_PER_CALL,
    PreferenceData,
    Scored,
    ScoredAnswers,
    answer_logprobs,
)
from crucible_kitchen.stages.preference_losses import PreferenceLossConfig, preference_metrics
from crucible_kitchen.stages.training import take_step
from crucible_kitchen.types import Array, Datum, Loss, SessionInfo, StepResult
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "PreferenceStepConfig",
    "dpo_step",
    "evaluate_preferences",
    "held_out_given",
    "log_dpo",
    "preference_eval_at_start",
    "preference_eval_due",
    "told_apart",
]

WIDE = 256  # hidden size from which on a model counts as pretrained


class PreferenceStepConfig(PreferenceLossConfig, OptimConfig):
    """What an optimizer step on comparisons depends on."""


@stage(writes="step")
async def dpo_step(
    session: TrainingSession, batch: Batch, data: PreferenceData, scored: Scored, config: PreferenceStepConfig
) -> StepResult:
    """Accumulate the gradient of a batch of comparisons and apply one optimizer step.

    The loss is the mean per pair, or per single answer, over all of the step's, however they are split.
    """
    train = scored.train
    parts = [[datum for unit in units for datum in train.datums(unit)] for units in data.submissions(batch)]
    loss = config.make_loss()
    if isinstance(loss, KTO):
        loss = await _with_reference_point(loss, session, train, batch.rows)
    return await take_step(session, parts, loss, _with_rate(config, session.info), data, batch, divisor=len(batch.rows))


@dpo_step.validate
def _takes_losses(training_client: TrainingClient, config: PreferenceStepConfig) -> None:
    can = training_client.capabilities
    if can.custom_loss == "refused":
        raise CapabilityError(
            f"the training backend takes no loss such as {config.loss!r}", hint="use another training_client"
        )


async def _with_reference_point(loss: KTO, session: TrainingSession, scored: ScoredAnswers, rows: Sequence[int]) -> KTO:
    """Return KTO's loss of one batch: its reference point is the policy's, on mismatched answers, without gradient."""
    assert scored.mismatched is not None
    datums = await run_sync(lambda: [scored.answers.mismatched(row) for row in rows])
    sums = np.array([x.sum(dtype=np.float64) for x in await answer_logprobs(session, datums)])
    return replace(loss, reference_point=kto_reference_point(sums - scored.mismatched[list(rows)]))


def _with_rate(config: PreferenceStepConfig, info: SessionInfo) -> PreferenceStepConfig:
    """Return the config with a learning rate; unset, a pretrained model gets a tenth of that of fine-tuning."""
    if config.learning_rate is not None:
        return config
    usual = recommended_learning_rate(info, lora=info.lora_rank > 0)
    return config.model_copy(update={"learning_rate": usual if 0 < info.hidden_size < WIDE else usual / 10})


@stage(writes="dpo_metrics")
async def log_dpo(step: StepResult, config: PreferenceStepConfig, run: Run) -> dict[str, float]:
    """Report a step's loss, accuracy, margin and rewards."""
    metrics = preference_metrics(step.loss, step.metrics)
    count = step.metrics["pairs" if config.paired else "rows"]
    run.emit(DpoStep(step=step.step, beta=config.beta, num_pairs=int(count), **metrics))
    return metrics


# --- evaluation ------------------------------------------------------------------------------------------------------


def held_out_given(data: PreferenceData) -> bool:
    """Whether there are comparisons to evaluate on."""
    return data.held_out is not None


def preference_eval_at_start(data: PreferenceData, config: HeldOutConfig) -> bool:
    """Whether the model is measured before the first step."""
    return config.eval_at_start and data.held_out is not None


def preference_eval_due(step: StepResult, data: PreferenceData, config: HeldOutConfig) -> bool:
    """Whether this step is one after which the model is measured."""
    return bool(config.eval_every) and step.step % config.eval_every == 0 and data.held_out is not None


@stage(writes="eval_results")
async def evaluate_preferences(
    session: TrainingSession, scored: Scored, config: PreferenceLossConfig, run: Run
) -> dict[str, Any]:
    """Score held-out comparisons: how often is the chosen answer preferred?

    ``accuracy`` counts pairs whose chosen answer gained more over the reference than the rejected one, so it is 0
    before the first step; ``ranking_accuracy`` those whose chosen answer is likelier as a whole. Single answers count
    when they are on their side of KTO's reference point.
    """
    held_out = scored.held_out
    assert held_out is not None, "guarded by held_out_given"
    loss = config.make_loss()
    if isinstance(loss, KTO):
        loss = await _with_reference_point(loss, session, held_out, range(len(held_out.answers)))
    total, sums, mistakes = 0.0, dict[str, float](), list[str]()
    units = ANSWERS_PER_CALL // 2
    for start in range(0, len(held_out.answers), units):
        groups = [held_out.datums(unit) for unit in range(start, min(start + units, len(held_out.answers)))]
        datums = [datum for group in groups for datum in group]
        logprobs = (await (await session.forward(datums))).logprobs
        lost, found, wrong = await run_sync(_evaluated, loss, groups, logprobs)
        total += lost
        mistakes += wrong
        sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
    return told_apart(total, sums, mistakes, session, run)


def _evaluated(
    loss: Loss, groups: Sequence[list[Datum]], logprobs: Sequence[Array]
) -> tuple[float, dict[str, float], list[str]]:
    """Return the summed loss, the summed metrics, and the keys of what was told apart wrongly."""
    total, sums, wrong = 0.0, dict[str, float](), list[str]()
    rows = iter(logprobs)
    for group in groups:
        own = [np.asarray(next(rows), np.float64) for _ in group]
        value = loss(own, [datum.loss_inputs for datum in group])
        total += value.total
        metrics = dict(value.metrics)
        if len(group) == 2:
            chosen, rejected = (x[d.loss_inputs["weights"] > 0].sum() for x, d in zip(own, group, strict=True))
            metrics["ranking"] = float(chosen > rejected)
        if not metrics["accuracy"]:
            wrong.append(group[0].key)
        sums = {key: sums.get(key, 0.0) + x for key, x in metrics.items()}
    return total, sums, wrong


def told_apart(
    total: float, sums: Mapping[str, float], mistakes: Sequence[str], session: TrainingSession, run: Run
) -> dict[str, Any]:
    """Report how well held-out comparisons were told apart, and return it as the state has it.

    Args:
        total: the summed loss.
        sums: of the losses' metrics; ``ranking`` counts pairs whose chosen answer is likelier.
        mistakes: keys of what was told apart wrongly.
        session: whose model it is.
        run: for the event.
    """
    paired = "pairs" in sums
    n = int(sums["pairs" if paired else "rows"])
    metrics = preference_metrics(total / n, sums)
    run.emit(DpoEvaluated(step=session.position, num_pairs=n, label=run.path.rpartition("/")[2], **metrics))
    ranking = {"ranking_accuracy": sums["ranking"] / n} if "ranking" in sums else {}
    return {
        **metrics,
        **ranking,
        "n": n,
        "average": "",
        "intervals": {"accuracy": list(_wilson(metrics["accuracy"], n))},
        "mistakes": list(mistakes[:20]),
        "step": session.position,
        "synthetic": session.capabilities.synthetic,
    }


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n (Wilson 1927)."""
    z = 1.959963984540054
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
