"""Policy-update stages: what actions were worth, the batch, the optimizer steps; group by group or batch by batch.

They know the training port and the learner's mathematics, no environment. Read next: ``policy_step.py``, one optimizer
step; ``policy_reports.py``, what is said of it; ``crucible_kitchen.rl.learning``.
"""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.ports import TrainingClient, TrainingSession
from crucible_kitchen.rl.batch import Batch
from crucible_kitchen.rl.config import LearnerConfig
from crucible_kitchen.rl.learning import (
    TrainableGroup,
    estimate,
    in_value_units,
    sampled_by,
    sampler_mismatch,
    settled,
    whitened,
)
from crucible_kitchen.rl.scales import Scales
from crucible_kitchen.rl.trajectories import TrajectoryGroup
from crucible_kitchen.stages.policy_reports import advantages_event, pooled, report_pass
from crucible_kitchen.stages.policy_step import PolicyStep, Update, UpdateConfig, divisor_of, loss_of, scores_of
from crucible_kitchen.stages.rollout import least_members
from crucible_kitchen.types import Datum, Float64Array, IntArray
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "Advantages",
    "Minibatches",
    "assemble_rl_batch",
    "compute_advantages",
    "ppo_update",
    "streaming_update",
    "streams",
]


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """The groups of one update with what their actions were worth, in the order of drawing."""

    groups: tuple[TrainableGroup, ...]
    scales: Scales


@dataclass(frozen=True, slots=True, eq=False)
class Minibatches:
    """The datums of one update.

    Attributes:
        epochs: per epoch, per optimizer step.
        trajectories: how many the datums were made of.
        sampled: of the first step's datums, see ``sampled_by``.
    """

    epochs: tuple[tuple[tuple[Datum, ...], ...], ...]
    trajectories: int
    sampled: tuple[Float64Array, ...]


def streams(config: LearnerConfig, session: TrainingSession) -> bool:
    """Whether each group's gradient is computed as the group arrives."""
    return config.batch_because(session.capabilities) is None


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
    scores = await scores_of(session, groups, config)
    scales = step.scales if step is not None else Scales()
    found = []
    for group, score in zip(groups, scores, strict=True):
        trainable, scales = estimate(group, config, score, scales, max_length=config.max_tokens)
        found.append(trainable)
    scales = settled(scales, found, config)
    found = in_value_units(found, scales)
    if config.normalize == "batch":
        found = whitened(found)
    if found:
        run.emit(advantages_event(found))
    yield Advantages(tuple(found), scales)


@stage(writes="rl_batch")
async def assemble_rl_batch(
    session: TrainingSession,
    rollouts: Batch[TrajectoryGroup],
    advantages: Advantages,
    config: UpdateConfig,
    run: Run,
) -> AsyncIterator[Minibatches]:
    """Split the batch into minibatches, anew for each epoch, seeded by the run.

    Language by whole trajectories, whose tokens see each other; observations, which do not, by single steps.
    """
    datums = [datum for group in advantages.groups for datum in group.datums]
    steps = _joined(datums) if datums and "observations" in datums[0].inputs else None
    count = len(datums) if steps is None else len(steps)
    fold = session.capabilities.step_scale != "exact"
    own = sampled_by(rollouts.update, advantages.groups)
    epochs, sampled = [], []
    for epoch in range(config.ppo_epochs if datums else 0):
        order = np.arange(count)
        if config.minibatches > 1:
            order = run.rng(f"epoch{epoch}").permutation(count)
        parts = np.array_split(order, config.minibatches)
        chosen = [[datums[i] for i in part] if steps is None else [_taken(steps, part)] for part in parts]
        epochs.append(tuple(tuple(_part(part, fold=fold)) for part in chosen))
        if epoch == 0:
            sampled = [own[i] for i in parts[0]] if steps is None else [np.concatenate(own)[parts[0]]]
    yield Minibatches(tuple(epochs), len(datums), tuple(sampled))


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
    divisor = divisor_of(datums)
    return [
        replace(datum, loss_inputs={**datum.loss_inputs, "weights": datum.loss_inputs["weights"] / divisor})
        for datum in datums
    ]


@stage(writes="step")
async def ppo_update(
    session: TrainingSession,
    advantages: Advantages,
    rl_batch: Minibatches,
    config: UpdateConfig,
    run: Run,
    step: PolicyStep | None = None,
) -> PolicyStep:
    """Take the optimizer steps of an update: ``ppo_epochs`` passes over the batch in ``minibatches`` parts."""
    loss = loss_of(config, session)
    fold = session.capabilities.step_scale != "exact"
    last: PolicyStep | None = None
    mismatch = _mismatch_before(step)
    passes: list[list[Mapping[str, float]]] = []
    for epoch, parts in enumerate(rl_batch.epochs):
        passes.append([])
        for datums in parts:
            divisor = divisor_of(datums)
            update = Update(session, config, divisor if not fold else 1.0)
            async with session.step(update.index) as scope:
                await update.submit(scope, datums, loss, None)
                last = await update.apply(scope, run, advantages.scales)
            if not passes[0]:
                mismatch = sampler_mismatch(rl_batch.sampled, update.logprobs, mismatch)
            passes[-1].append(last.policy)
        report_pass(run, passes[-1], epoch, rl_batch.trajectories)
    assert last is not None, "a batch has trajectories"
    policy = pooled([report for reports in passes for report in reports])
    return replace(last, policy={**policy, "sampler_mismatch": mismatch})


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
    loss, scales = loss_of(config, session), step.scales if step is not None else Scales()
    ordered = session.capabilities.ordered_accumulation
    found: list[TrainableGroup] = []
    update = Update(session, config, 0.0)
    async with session.step(update.index) as scope:
        async for group in rollouts:
            (scores,) = await scores_of(session, [group], config)
            trainable, scales = estimate(group, config, scores, scales, max_length=config.max_tokens)
            found.append(trainable)
            update.divisor += trainable.divisor
            await update.submit(scope, trainable.datums, loss, trainable.index if ordered else None)
        done = await update.apply(scope, run, scales)
    own = sampled_by(rollouts.update, found)
    mismatch = sampler_mismatch(own, update.logprobs, _mismatch_before(step))
    found.sort(key=lambda g: g.index)
    run.emit(advantages_event(found))
    report_pass(run, [done.policy], 0, sum(len(g.datums) for g in found))
    return replace(done, policy={**done.policy, "sampler_mismatch": mismatch})


def _mismatch_before(step: PolicyStep | None) -> float:
    """Return what the updates before found of their samplers."""
    return math.nan if step is None else step.policy["sampler_mismatch"]


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
