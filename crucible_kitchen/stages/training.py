"""Training stages: open the session, take optimizer steps, save states and the final weights.

They know the training port only. A step is retried by opening it again, never by repeating a call. Read next:
``crucible_kitchen.ports.training_client``.
"""

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from crucible_kitchen.config import AdamConfig, CheckpointConfig, ModelConfig, OptimConfig
from crucible_kitchen.errors import CapabilityError, NonFiniteLoss
from crucible_kitchen.events import TrainingEpoch, TrainingStep
from crucible_kitchen.learner.hyperparams import recommended_learning_rate
from crucible_kitchen.learner.schedules import learning_rate, warmup_steps
from crucible_kitchen.ports import BlobStore, ModelRegistry, TrainingClient, TrainingSession
from crucible_kitchen.stages.data import Batch, EpochBatches, TrainingData, TrainingPlan
from crucible_kitchen.stages.folding import folded
from crucible_kitchen.types import (
    BlobRef,
    Datum,
    ForwardBackwardResult,
    Loss,
    OutputsLoss,
    SessionInfo,
    SessionSpec,
    StepResult,
)
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.memory import Keep
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "EpochStats",
    "batches",
    "check_weights",
    "checkpoint_due",
    "epochs",
    "init_session",
    "local_model",
    "log_epoch",
    "log_step",
    "save_checkpoint",
    "save_final",
    "session_spec",
    "take_step",
    "train_step",
    "training_unsaved",
]


SCORES = ("accuracy", "reward_mean")
"""What an evaluation's score is, the first that it has: what ``keep_best`` goes by."""


@dataclass(frozen=True, slots=True)
class EpochStats:
    """The losses of an epoch so far: their sum and number."""

    total: float = 0.0
    steps: int = 0


@stage(writes="session")
async def init_session(
    training_client: TrainingClient, config: ModelConfig, run: Run
) -> AsyncIterator[TrainingSession]:
    """Open a training session on the model; it closes when the workflow ends."""
    async with training_client.open_session(await session_spec(config, run)) as session:
        yield session


async def session_spec(config: ModelConfig, run: Run) -> SessionSpec:
    """Return what a session on the config's model is opened on."""
    return SessionSpec(
        model=config.model,
        lora=config.lora(),
        seed=config.seed,
        directory=str(run.directory),
        run_id=run.id,
        chat_template=await run_sync(_template, config.chat_template),
    )


async def local_model(
    model: str, into: Path, model_registry: ModelRegistry | None, blob_store: BlobStore | None
) -> str:
    """Return a name that a training client knows; the weights of a registered version, ``name:version``, are fetched.

    Args:
        model: as the config has it.
        into: where the weights go, unless an earlier attempt of the run has put them there.
        model_registry: knows the version; without one the name is left as it is.
        blob_store: has the weights.
    """
    name, colon, version = model.rpartition(":")
    if not colon or model_registry is None or blob_store is None or "/" in version or "\\" in version:
        return model
    found = await model_registry.get(name, int(version) if version.isdecimal() else version)
    if not await run_sync(into.exists):
        await blob_store.get_tree(found.uri, into)
    return str(into)


def _template(value: str | None) -> str | None:
    """Return a chat template given as text or as the path of a file."""
    if value is None or "{" in value:
        return value
    return Path(value).read_text(encoding="utf-8")


def check_weights(training_client: TrainingClient, config: ModelConfig) -> None:
    """Check that a backend can train the weights that a config names, in the way that it names.

    Raises:
        CapabilityError: it cannot.
    """
    can, lora = training_client.capabilities, config.lora()
    if lora is None and not can.full_weights:
        raise CapabilityError("the training backend cannot train all weights", hint="set lora_rank=16")
    if lora is not None and not can.lora:
        raise CapabilityError("the training backend cannot train LoRA adapters", hint="set lora_rank=0")
    asked = [name for name in ("dropout", "targets") if lora is not None and getattr(lora, name)]
    asked = [f"lora_{name}" for name in asked] + (["chat_template"] if config.chat_template is not None else [])
    if asked and not can.session_options:
        raise CapabilityError(f"the training backend cannot be told {', '.join(asked)}", hint="leave it out")


@init_session.validate
def _weights_can_be_trained(training_client: TrainingClient, config: ModelConfig) -> None:
    check_weights(training_client, config)
    if training_client.capabilities.recovery == "none":
        raise CapabilityError(
            "the training backend has neither step tokens nor rollback: a run could not survive a crash",
            hint="use another training_client",
        )


def epochs(data: TrainingPlan) -> range:
    """As many passes over the data as the run's steps need."""
    return range(math.ceil(data.total_steps / data.steps_per_epoch))


def batches(data: TrainingPlan, epoch: int) -> EpochBatches:
    """The epoch's batches, one optimizer step each."""
    return data.batches(epoch)


@stage(writes="step")
async def train_step(session: TrainingSession, batch: Batch, data: TrainingData, config: OptimConfig) -> StepResult:
    """Accumulate the gradient of a batch and apply one optimizer step.

    The loss is the mean per weighted token over all of the step's rows, however they are split.
    """
    parts = data.datums(batch)
    weight = sum(float(d.loss_inputs["weights"].sum()) for part in parts for d in part)
    return await take_step(session, parts, "cross_entropy", config, data, batch, divisor=weight)


async def take_step(
    session: TrainingSession,
    parts: Sequence[Sequence[Datum]],
    loss: str | Loss | OutputsLoss,
    config: OptimConfig,
    plan: TrainingPlan,
    batch: Batch,
    *,
    divisor: float,
) -> StepResult:
    """Accumulate the gradient of a step's submissions, divide it, and apply one optimizer step.

    Args:
        session: what is trained.
        parts: the datums of each submission.
        loss: whose sum over all of them, over the divisor, is the step's loss.
        config: how the weights are updated.
        plan: how many steps the run has.
        batch: says which of the run's steps this is; a session that stands elsewhere refuses it.
        divisor: what makes a mean of a sum: weighted tokens, pairs, rows.

    Raises:
        NonFiniteLoss: the loss is not a number; the weights are as they were.
    """
    index = batch.epoch * plan.steps_per_epoch + batch.index
    rate = step_rate(index, plan.total_steps, config, session.info)
    if session.capabilities.step_scale != "exact":
        parts, loss = folded(parts, loss, 1.0 / divisor)
        divisor = 1.0
    began = anyio.current_time()
    async with session.step(index) as step:
        submitted = [await step.forward_backward(part, loss) for part in parts]
        applied = await step.apply(config.adam(rate), scale=1.0 / divisor)
        results = [await pending for pending in submitted]
        total = sum(r.loss for r in results) / divisor
        if not math.isfinite(total):
            raise NonFiniteLoss("the loss", index + 1, _keys(parts))
        outcome = await applied
    taken = max(anyio.current_time() - began, 1e-9)
    tokens = sum(r.tokens for r in results)
    return StepResult(
        step=outcome.step,
        epoch=batch.epoch,
        loss=total,
        learning_rate=rate,
        grad_norm=outcome.grad_norm,
        tokens=tokens,
        tokens_per_sec=tokens / taken,
        metrics=_summed(results) | dict(outcome.metrics),
    )


@train_step.validate
def _has_cross_entropy(training_client: TrainingClient) -> None:
    if "cross_entropy" not in training_client.capabilities.losses:
        raise CapabilityError("the training backend has no cross_entropy loss", hint="use another training_client")


def step_rate(index: int, total: int, config: AdamConfig, info: SessionInfo) -> float:
    """Return the learning rate of step ``index`` (from 0) of ``total``."""
    return learning_rate(
        index,
        total,
        peak=config.learning_rate or recommended_learning_rate(info, lora=info.lora_rank > 0),
        schedule=config.lr_schedule,
        warmup_steps=warmup_steps(config.warmup, total),
        end=config.lr_end,
        power=config.lr_power,
    )


def _keys(parts: Sequence[Sequence[Datum]]) -> list[str]:
    return [datum.key for part in parts for datum in part]


def _summed(results: Sequence[ForwardBackwardResult]) -> dict[str, float]:
    total: dict[str, float] = {}
    for result in results:
        for name, value in result.metrics.items():
            total[name] = total.get(name, 0.0) + value
    return total


@stage(writes="epoch_stats")
async def log_step(step: StepResult, data: TrainingPlan, run: Run, epoch_stats: EpochStats | None = None) -> EpochStats:
    """Report a step, and keep the epoch's mean loss."""
    run.emit(
        TrainingStep(
            step=step.step,
            epoch=step.epoch,
            loss=step.loss,
            lr=step.learning_rate,
            tokens_per_sec=step.tokens_per_sec,
            grad_norm=step.grad_norm,
            total_steps=data.total_steps,
        )
    )
    before = EpochStats() if epoch_stats is None or run.turn("batch") == 0 else epoch_stats
    return EpochStats(before.total + step.loss, before.steps + 1)


@stage()
async def log_epoch(epoch: int, run: Run, epoch_stats: EpochStats | None = None) -> None:
    """Report an epoch."""
    if epoch_stats is not None and epoch_stats.steps:
        mean = epoch_stats.total / epoch_stats.steps
        run.emit(TrainingEpoch(epoch=epoch, steps=epoch_stats.steps, avg_loss=mean))


def checkpoint_due(step: StepResult, config: CheckpointConfig) -> bool:
    """Whether this step is one after which the run can be resumed."""
    return bool(config.save_every) and step.step % config.save_every == 0


def training_unsaved(session: TrainingSession, config: CheckpointConfig) -> bool:
    """Whether the end of training needs a checkpoint of its own, so that what follows never repeats it."""
    return bool(config.save_every) and session.position % config.save_every != 0


@stage()
async def save_checkpoint(
    session: TrainingSession, config: CheckpointConfig, run: Run, eval_results: dict[str, Any] | None = None
) -> None:
    """Ask for a checkpoint: it is written while training goes on, and old ones are dropped."""
    score = None
    if eval_results is not None and eval_results["step"] == session.position:
        score = next((float(eval_results[name]) for name in SCORES if name in eval_results), None)
    run.checkpoint(Keep(config.keep_last, config.keep_every, config.keep_best, score))


@stage(writes="final_weights")
async def save_final(session: TrainingSession, blob_store: BlobStore, config: ModelConfig, run: Run) -> BlobRef:
    """Export the trained weights and store them under the hash of their content. A failure fails the run."""
    directory = run.directory / "export"
    await run_sync(_fresh_directory, directory)
    exported = await session.export(str(directory))
    weights = await blob_store.put_tree(directory, kind="weights", name=f"{config.model} ({exported.format})")
    run.add_artifact(weights)
    return weights


@save_final.validate
def _can_export(training_client: TrainingClient) -> None:
    if not training_client.capabilities.export:
        raise CapabilityError(
            "the training backend cannot export weights", hint="use .without('save_final').without('register_model')"
        )


def _fresh_directory(path: Path) -> None:
    """Make an empty directory; what an earlier try of this run left in it is removed."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
