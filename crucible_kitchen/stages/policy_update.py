"""Policy-update stages: what actions were worth, the batch, the optimizer steps; group by group or batch by batch.

They know the training port and the learner's mathematics, no environment. Read next: ``crucible_kitchen.rl.learning``.
"""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import numpy as np

from crucible_kitchen.config import AdamConfig
from crucible_kitchen.errors import CapabilityError, NonFiniteLoss
from crucible_kitchen.events import AdvantagesComputed, PipelineMeasured, PPOUpdated, RLStep, TrainingStep
from crucible_kitchen.learner import Moments
from crucible_kitchen.ports import Pending, TrainingClient, TrainingSession, TrainingStepScope
from crucible_kitchen.rl.config import LearnerConfig
from crucible_kitchen.rl.learning import (
    Scores,
    TrainableGroup,
    estimate,
    needed_scores,
    policy_loss,
    scoring_datums,
    whitened,
)
from crucible_kitchen.rl.pipeline import Batch
from crucible_kitchen.rl.trajectories import TrajectoryGroup
from crucible_kitchen.stages.rollout import ReinforcementPartsConfig, batch_because, least_members
from crucible_kitchen.stages.training import step_rate
from crucible_kitchen.types import Datum, ForwardBackwardResult, IntArray, Loss, OutputsLoss, StepResult
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "Advantages",
    "Minibatches",
    "PolicyStep",
    "UpdateConfig",
    "assemble_rl_batch",
    "compute_advantages",
    "log_rl_metrics",
    "ppo_update",
    "streaming_update",
    "streams",
]


class UpdateConfig(ReinforcementPartsConfig, AdamConfig):
    """What an update depends on."""


@dataclass(frozen=True, slots=True)
class PolicyStep(StepResult):
    """The optimizer steps of one update; ``loss`` and rates are of the last.

    Attributes:
        policy: what is reported of the policy: ``policy_loss``, ``value_loss``, ``entropy``, ``clip_fraction``...
        moments: of the advantages seen so far, for ``normalize=running``.
    """

    policy: Mapping[str, float] = field(default_factory=dict)
    moments: Moments = field(default_factory=Moments)


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """The groups of one update with what their actions were worth, in the order of drawing."""

    groups: tuple[TrainableGroup, ...]
    moments: Moments


@dataclass(frozen=True, slots=True, eq=False)
class Minibatches:
    """The datums of one update: per epoch, per optimizer step."""

    epochs: tuple[tuple[tuple[Datum, ...], ...], ...]
    trajectories: int


def streams(config: LearnerConfig, session: TrainingSession) -> bool:
    """Whether each group's gradient is computed as the group arrives."""
    return batch_because(config, session) is None


# -- the batch learner -------------------------------------------------------------------------------------------------


@stage(writes="advantages")
async def compute_advantages(
    session: TrainingSession,
    rollouts: Batch[TrajectoryGroup],
    config: UpdateConfig,
    run: Run,
    step: PolicyStep | None = None,
) -> AsyncIterator[Advantages]:
    """Wait for all rollouts of the update and compute what their actions were worth."""
    groups = await rollouts.all()
    scores = await _scores(session, groups, config)
    moments = step.moments if step is not None else Moments()
    found = []
    for group, score in zip(groups, scores, strict=True):
        trainable, moments = estimate(group, config, score, moments, max_length=config.max_tokens)
        found.append(trainable)
    if config.normalize == "batch":
        found = whitened(found)
    if found:
        run.emit(_advantages_event(found))
    yield Advantages(tuple(found), moments)


@stage(writes="rl_batch")
async def assemble_rl_batch(
    session: TrainingSession, advantages: Advantages, config: UpdateConfig, run: Run
) -> AsyncIterator[Minibatches]:
    """Split the batch into minibatches, anew for each epoch, seeded by the run.

    Language by whole trajectories, whose tokens see each other; observations, which do not, by single steps.
    """
    datums = [datum for group in advantages.groups for datum in group.datums]
    steps = _joined(datums) if datums and "observations" in datums[0].inputs else None
    count = len(datums) if steps is None else len(steps)
    fold = session.capabilities.step_scale != "exact"
    epochs = []
    for epoch in range(config.ppo_epochs if datums else 0):
        order = np.arange(count)
        if config.minibatches > 1:
            order = run.rng(f"epoch{epoch}").permutation(count)
        parts = np.array_split(order, config.minibatches)
        chosen = [[datums[i] for i in part] if steps is None else [_taken(steps, part)] for part in parts]
        epochs.append(tuple(tuple(_part(part, fold=fold)) for part in chosen))
    yield Minibatches(tuple(epochs), len(datums))


def _joined(datums: Sequence[Datum]) -> Datum:
    """Return trajectories of observations as one datum; each step has its share of what its trajectory divides by."""
    shares = [datum.loss_inputs["divisor"] / len(datum) for datum in datums]
    inputs = {name: np.concatenate([d.loss_inputs[name] for d in datums]) for name in datums[0].loss_inputs}
    observations = np.concatenate([datum.inputs["observations"] for datum in datums])
    return Datum({"observations": observations}, {**inputs, "divisor": np.concatenate(shares)}, "rollouts")


def _taken(steps: Datum, part: IntArray) -> Datum:
    """Return some steps as a datum."""
    inputs = {name: values[part] for name, values in steps.loss_inputs.items()}
    inputs["divisor"] = np.full(len(part), inputs["divisor"].sum())
    return Datum({"observations": steps.inputs["observations"][part]}, inputs, steps.key)


def _part(datums: Sequence[Datum], *, fold: bool) -> Sequence[Datum]:
    """Return a minibatch; a backend that does not scale a step by any number has it in the weights."""
    if not fold:
        return datums
    divisor = _divisor(datums)
    return [
        replace(datum, loss_inputs={**datum.loss_inputs, "weights": datum.loss_inputs["weights"] / divisor})
        for datum in datums
    ]


@stage(writes="step")
async def ppo_update(
    session: TrainingSession, advantages: Advantages, rl_batch: Minibatches, config: UpdateConfig, run: Run
) -> PolicyStep:
    """Take the optimizer steps of an update: ``ppo_epochs`` passes over the batch in ``minibatches`` parts."""
    loss = _loss(config, session)
    fold = session.capabilities.step_scale != "exact"
    last: PolicyStep | None = None
    for epoch, parts in enumerate(rl_batch.epochs):
        reports = []
        for datums in parts:
            divisor = _divisor(datums)
            update = _Update(session, config, divisor if not fold else 1.0)
            async with session.step(update.index) as scope:
                await update.submit(scope, datums, loss, None)
                last = await update.apply(scope, run, advantages.moments)
            reports.append(last.policy)
        _report(run, reports, epoch, rl_batch.trajectories)
    assert last is not None, "a batch has trajectories"
    return last


# -- the streaming learner ---------------------------------------------------------------------------------------------


@stage(writes="step")
async def streaming_update(
    session: TrainingSession,
    rollouts: Batch[TrajectoryGroup],
    config: UpdateConfig,
    run: Run,
    step: PolicyStep | None = None,
) -> PolicyStep:
    """Compute each group's gradient as it arrives, and take one optimizer step when the batch is complete."""
    loss, moments = _loss(config, session), step.moments if step is not None else Moments()
    ordered = session.capabilities.ordered_accumulation
    found: list[TrainableGroup] = []
    update = _Update(session, config, 0.0)
    async with session.step(update.index) as scope:
        async for group in rollouts:
            (scores,) = await _scores(session, [group], config)
            trainable, moments = estimate(group, config, scores, moments, max_length=config.max_tokens)
            found.append(trainable)
            update.divisor += trainable.divisor
            await update.submit(scope, trainable.datums, loss, trainable.index if ordered else None)
        done = await update.apply(scope, run, moments)
    found.sort(key=lambda g: g.index)
    run.emit(_advantages_event(found))
    _report(run, [done.policy], 0, sum(len(g.datums) for g in found))
    return done


@ppo_update.validate
@streaming_update.validate
def _can_update(training_client: TrainingClient, config: UpdateConfig) -> None:
    can = training_client.capabilities
    if can.custom_loss == "refused" and config.loss not in can.losses:
        raise CapabilityError(f"the training backend has no loss {config.loss!r} and takes none of ours")
    if config.group_relative and (config.group_size < 2 or config.min_group_size == 1):
        raise CapabilityError(
            f"advantage={config.advantage} compares rollouts of one problem, and a group of one has nobody to compare",
            hint="set group_size=2 or more (and min_group_size=2 or more, if at all)",
        )
    if config.min_group_size > config.group_size:
        raise CapabilityError("min_group_size is more than group_size")
    if config.model != "mlp" and config.minibatches > config.groups_per_batch * least_members(config):
        raise CapabilityError(
            f"{config.minibatches} minibatches are more than the trajectories that a batch has at least",
            hint="lower minibatches, or raise groups_per_batch",
        )
    if config.learner == "streaming" and can.step_scale != "exact":
        raise CapabilityError(
            "learner=streaming needs a backend that scales a step by a number known only then",
            hint="use learner=batch, which scales the weights before",
        )
    if config.entropy_coef and config.temperature != 1.0 and not can.entropy:
        raise CapabilityError(
            "entropy_coef is estimated from samples at temperature 1 on this backend", hint="set temperature=1"
        )


# -- both --------------------------------------------------------------------------------------------------------------


class _Update:
    """One optimizer step on its way."""

    def __init__(self, session: TrainingSession, config: UpdateConfig, divisor: float) -> None:
        self.index = session.position
        self.divisor = divisor
        self._session = session
        self._config = config
        self._began = anyio.current_time()
        self._pending: list[tuple[int, Pending[ForwardBackwardResult]]] = []
        self._keys: list[str] = []

    async def submit(
        self, scope: TrainingStepScope, datums: Sequence[Datum], loss: Loss | OutputsLoss, order: int | None
    ) -> None:
        """Submit datums; their results are summed in the order of ``order``, else of submission."""
        place = len(self._pending) if order is None else order
        pending = await (
            scope.forward_backward(datums, loss) if order is None else scope.forward_backward(datums, loss, order=order)
        )
        self._pending.append((place, pending))
        self._keys += [datum.key for datum in datums]

    async def apply(self, scope: TrainingStepScope, run: Run, moments: Moments) -> PolicyStep:
        """Apply the step and return what is reported of it."""
        config = self._config
        total_steps = config.num_rollouts * config.steps_per_update
        rate = step_rate(self.index, total_steps, config, self._session.info)
        applied = await scope.apply(config.adam(rate), scale=1.0 / self.divisor)
        ordered = sorted(self._pending, key=lambda pair: pair[0])
        results = [await pending for _, pending in ordered]
        loss = sum(r.loss for r in results) / self.divisor
        if not math.isfinite(loss):
            raise NonFiniteLoss("the loss", self.index + 1, self._keys)
        outcome = await applied
        taken = max(anyio.current_time() - self._began, 1e-9)
        tokens = sum(r.tokens for r in results)
        return PolicyStep(
            step=outcome.step,
            epoch=run.turn("rollouts"),
            loss=loss,
            learning_rate=rate,
            grad_norm=outcome.grad_norm,
            tokens=tokens,
            tokens_per_sec=tokens / taken,
            metrics=dict(outcome.metrics),
            policy=_policy_metrics(_summed(results), self.divisor),
            moments=moments,
        )


async def _scores(session: TrainingSession, groups: Sequence[TrajectoryGroup], config: LearnerConfig) -> list[Scores]:
    """Ask the model what has to be known of groups before they are learned from; all asked before any is awaited."""
    outputs, asked = needed_scores(config), []
    for group in groups:
        datums = scoring_datums(group) if outputs or config.kl_coef else []
        own = await session.forward(datums, outputs=outputs) if outputs else None
        reference = await session.forward(datums, reference=True) if config.kl_coef else None
        asked.append((own, reference))
    found: list[Scores] = []
    for own, reference in asked:
        scores: dict[str, Any] = {}
        if own is not None:
            result = await own
            scores |= {"values": result.outputs["values"]} if "values" in outputs else {}
            scores |= {"logprobs": result.logprobs} if "logprobs" in outputs else {}
        if reference is not None:
            scores["reference"] = (await reference).logprobs
        found.append(scores)
    return found


def _loss(config: LearnerConfig, session: TrainingSession) -> Loss | OutputsLoss:
    return policy_loss(config, exact_entropy=session.capabilities.entropy)


def _divisor(datums: Sequence[Datum]) -> float:
    return sum(float(d.loss_inputs["divisor"][0]) for d in datums)


def _summed(results: Sequence[ForwardBackwardResult]) -> dict[str, float]:
    """Add up the metrics of calls; a name ending in ``:max`` says that the largest counts."""
    found: dict[str, float] = {}
    for result in results:
        for name, value in result.metrics.items():
            before = found.get(name)
            if before is None:
                found[name] = value
            else:
                found[name] = max(before, value) if name.endswith(":max") else before + value
    return found


def _policy_metrics(sums: Mapping[str, float], divisor: float) -> dict[str, float]:
    """Return means per token, and losses as the optimizer saw them."""
    tokens = max(sums.get("tokens", 0.0), 1.0)
    found = {
        "policy_loss": sums.get("policy_loss", 0.0) / divisor,
        "value_loss": sums.get("value_loss", 0.0) / divisor,
        "entropy": sums.get("exact_entropy", sums.get("entropy", 0.0)) / tokens,
        "clip_fraction": sums.get("clipped", 0.0) / tokens,
        "kl_divergence": sums.get("approx_kl", 0.0) / tokens,
        "ratio_mean": sums.get("ratio", 0.0) / tokens,
        "ratio_max": sums.get("ratio:max", 0.0),
    }
    if "kl" in sums:
        found["kl_reference"] = sums["kl"] / tokens
    return found


def _mean(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([r[name] for r in reports])) for name in reports[0]}


def _report(run: Run, reports: Sequence[Mapping[str, float]], epoch: int, size: int) -> None:
    mean = _mean(reports)
    names = PPOUpdated.measurements
    run.emit(PPOUpdated(**{name: mean[name] for name in names}, epoch=epoch, batch_size=size))


def _advantages_event(groups: Sequence[TrainableGroup]) -> AdvantagesComputed:
    a, r = np.concatenate([g.advantages for g in groups]), np.concatenate([g.returns for g in groups])
    return AdvantagesComputed(
        advantage_mean=float(a.mean()),
        advantage_std=float(a.std()),
        return_mean=float(r.mean()),
        return_std=float(r.std()),
        num_steps=len(a),
    )


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
    learner = dict(rollouts.learner.spent())
    workers: dict[str, float] = {}
    for worker in rollouts.workers:
        for cause, seconds in worker.spent().items():
            workers[cause] = workers.get(cause, 0.0) + seconds
    ages = rollouts.staleness
    tokens = sum(ages.values())
    waits = rollouts.waiting_for()
    return PipelineMeasured(
        overlap_efficiency=rollouts.efficiency,
        learner_idle_share=learner.get("wait", 0.0) / max(rollouts.learner.wall, 1e-9),
        queue_depth=rollouts.depth,
        in_flight=rollouts.in_flight,
        staleness_mean=sum(age * n for age, n in ages.items()) / max(tokens, 1),
        staleness_max=max(ages, default=0),
        waste=rollouts.waste,
        length_bias=rollouts.length_bias,
        step=batch.update + 1,
        slowest=waits[0][0] if waits else -1,
        staleness={str(age): n for age, n in sorted(ages.items())},
        ledger=rollouts.ledger.to_json(),
        learner_seconds=learner,
        worker_seconds=workers,
    )
