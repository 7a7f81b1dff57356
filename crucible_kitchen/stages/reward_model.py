"""Reward model stages: a head that gives one number to an answer, trained so that preferred answers get more.

They know a session with a value head and the learner's loss, no head. Read next: ``crucible_kitchen.learner.reward``.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from crucible_kitchen.config import ModelConfig, OptimConfig, RunConfig
from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.learner.reward import BradleyTerry
from crucible_kitchen.learner.terms import Term, WeightedSum
from crucible_kitchen.ports import BlobStore, TrainingClient, TrainingSession
from crucible_kitchen.stages.data import Batch
from crucible_kitchen.stages.preference import told_apart
from crucible_kitchen.stages.preference_data import ANSWERS_PER_CALL, PreferenceData
from crucible_kitchen.stages.preference_losses import preference_metrics
from crucible_kitchen.stages.stored import fetched, model_at
from crucible_kitchen.stages.training import session_spec, take_step
from crucible_kitchen.types import BlobRef, Datum, StepResult
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = ["RewardLossConfig", "evaluate_rewards", "init_reward_session", "log_rewards", "reward_datums", "reward_step"]


class RewardLossConfig(RunConfig):
    """What a reward model minimises."""

    centring: float = Field(default=0.01, ge=0)
    """Pull of the scores towards 0; without it only their differences are determined."""


class RewardStepConfig(OptimConfig, RewardLossConfig):
    """What an optimizer step of a reward model depends on."""


@stage(writes="session", name="init_session")
async def init_reward_session(
    training_client: TrainingClient,
    config: ModelConfig,
    run: Run,
    blob_store: BlobStore | None = None,
    sft_weights: BlobRef | None = None,
) -> AsyncIterator[TrainingSession]:
    """Open a session whose model has a head of one number, on the weights that were trained before if there are any."""
    if sft_weights is not None:
        config = model_at(config, await fetched(sft_weights.uri, "sft", blob_store, run))
    spec = replace(await session_spec(config, run), value_head=True)
    async with training_client.open_session(spec) as session:
        yield session


@init_reward_session.validate
def _has_a_head(training_client: TrainingClient) -> None:
    if not training_client.capabilities.value_head:
        raise CapabilityError(
            "the training backend has no value head, which a reward model's scores come from",
            hint="use a judge (judge=...) or training_client=torch",
        )


def reward_datums(datums: Sequence[Datum]) -> list[Datum]:
    """Return whole answers as the head reads them: all tokens, the score at the last."""
    found = []
    for datum in datums:
        tokens = np.append(datum.inputs["tokens"], datum.loss_inputs["target_tokens"][-1])
        weights = np.zeros(len(tokens), np.float32)
        weights[-1] = 1
        found.append(Datum({"tokens": tokens}, {"weights": weights}, datum.key))
    return found


@stage(writes="step")
async def reward_step(
    session: TrainingSession, batch: Batch, data: PreferenceData, config: RewardStepConfig
) -> StepResult:
    """Accumulate the gradient of a batch of comparisons and apply one optimizer step; the loss is a mean per pair."""
    parts = [
        reward_datums([datum for unit in units for datum in data.answers.datums(unit)])
        for units in data.submissions(batch)
    ]
    loss = WeightedSum(Term(BradleyTerry(centring=config.centring), "values"))
    return await take_step(session, parts, loss, config, data, batch, divisor=len(batch.rows))


@stage(writes="reward_metrics")
async def log_rewards(step: StepResult) -> dict[str, float]:
    """Keep a step's loss, accuracy, margin and scores; its loss is told by ``training.step``."""
    return preference_metrics(step.loss, step.metrics)


@stage(writes="eval_results")
async def evaluate_rewards(
    session: TrainingSession, data: PreferenceData, config: RewardLossConfig, run: Run
) -> dict[str, Any]:
    """Score held-out comparisons: ``accuracy`` counts pairs whose chosen answer has the greater score."""
    held_out = data.held_out
    assert held_out is not None, "guarded by held_out_given"
    loss = BradleyTerry(centring=config.centring)
    total, sums, mistakes = 0.0, dict[str, float](), list[str]()
    units = ANSWERS_PER_CALL // 2
    for start in range(0, len(held_out), units):
        groups = [reward_datums(held_out.datums(u)) for u in range(start, min(start + units, len(held_out)))]
        result = await (await session.forward([d for group in groups for d in group], outputs=("values",)))
        values = iter(result.outputs["values"])
        for group in groups:
            value = loss([np.asarray(next(values), np.float64) for _ in group], [d.loss_inputs for d in group])
            total += value.total
            sums = {key: sums.get(key, 0.0) + x for key, x in value.metrics.items()}
            if not value.metrics["accuracy"]:
                mistakes.append(group[0].key)
    return told_apart(total, sums, mistakes, session, run)
