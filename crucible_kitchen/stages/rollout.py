"""Rollout stages: open the environments and the policy, roll out problems, publish new weights.

They know the environment port and a session's samplers, nothing of losses. Read next: ``crucible_kitchen.rl.pipeline``.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio
import numpy as np

from crucible_kitchen.config import ModelConfig
from crucible_kitchen.errors import CapabilityError, ConfigError, EmptyDataset
from crucible_kitchen.events import EnvGroupBuilt, GroupDropped, RolloutComplete
from crucible_kitchen.ports import BlobStore, EnvironmentSource, ModelRegistry, TrainingClient, TrainingSession
from crucible_kitchen.rl.batch import Batch
from crucible_kitchen.rl.config import LearnerConfig, RolloutConfig
from crucible_kitchen.rl.environments import open_environment
from crucible_kitchen.rl.pipeline import Rollouts
from crucible_kitchen.rl.plan import PipelinePlan
from crucible_kitchen.rl.policy import PublishedPolicy
from crucible_kitchen.rl.rollout import FATAL, Roller, RolloutRules
from crucible_kitchen.rl.staleness import problem_order
from crucible_kitchen.rl.standing import Standing
from crucible_kitchen.rl.trajectories import Ticket, TrajectoryGroup
from crucible_kitchen.stages.training import check_weights, local_model, session_spec
from crucible_kitchen.types import MlpSpec
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "EnvironmentPool",
    "ReinforcementPartsConfig",
    "build_env_group",
    "do_rollout",
    "init_policy_session",
    "log_rollouts",
    "mean_metrics",
    "open_policy",
    "publish_policy",
    "roller",
    "rollout_feed",
]


class ReinforcementPartsConfig(ModelConfig, RolloutConfig, LearnerConfig):
    """What rollouts depend on."""


@dataclass(frozen=True, slots=True, eq=False)
class EnvironmentPool:
    """The opened environments, and the rollouts in them.

    Attributes:
        name: of the environment.
        fingerprint: of its problems.
        source: the problems.
        rules: how groups are rolled out.
        rollouts: what is drawn, in flight, buffered and trained.
        standing: the environment that goes on from group to group, with ``horizon``.
    """

    name: str
    fingerprint: str
    source: EnvironmentSource
    rules: RolloutRules
    rollouts: Rollouts[TrajectoryGroup]
    standing: Standing


@stage(writes="session", name="init_session")
async def init_policy_session(
    training_client: TrainingClient,
    config: ReinforcementPartsConfig,
    run: Run,
    model_registry: ModelRegistry | None = None,
    blob_store: BlobStore | None = None,
) -> AsyncIterator[TrainingSession]:
    """Open a training session on the policy, with a value head or a frozen reference where the method needs one."""
    model = await local_model(config.model, run.directory / "model", model_registry, blob_store)
    spec = replace(
        await session_spec(config, run),
        model=model,
        value_head=config.advantage == "gae",
        reference=config.kl_coef > 0,
    )
    source = open_environment(config.env, config.env_options)
    try:
        space = await run_sync(lambda: source.space)
    finally:
        await source.aclose()
    if (space is None) == (config.model == "mlp"):
        kind = "language" if space is None else "arrays of numbers"
        hint = "set model=tiny" if space is None else "set model=mlp"
        raise ConfigError(f"the environment {config.env!r} speaks {kind}, which {config.model!r} does not", hint=hint)
    if space is not None:
        spec = replace(spec, mlp=MlpSpec(space.features, space.actions))
    async with training_client.open_session(spec) as session:
        yield session


@init_policy_session.validate
def _policy_can_be_trained(training_client: TrainingClient, config: ReinforcementPartsConfig) -> None:
    check_weights(training_client, config)
    can = training_client.capabilities
    if config.model != "mlp" and not can.sampling:
        raise CapabilityError("the training backend cannot sample, so nothing can be rolled out")
    if config.model != "mlp" and not can.sampling_options and _samples_specially(config):
        raise CapabilityError(
            "the training backend samples in its own way, from the model's own distribution",
            hint="set sampling=fast, temperature=1, top_p=1, top_k=0",
        )
    if config.model == "mlp" and not can.mlp:
        raise CapabilityError("the training backend has no policy over observations", hint="use training_client=torch")
    if config.advantage == "gae" and not can.value_head:
        raise CapabilityError(
            "advantage=gae needs a value head, which the training backend does not have",
            hint="write advantage=grpo (or dr_grpo, rloo, centred), which compares the rollouts of one problem",
        )
    if config.horizon and config.model != "mlp":
        raise CapabilityError("horizon lets a vector environment go on, whose policy is an mlp", hint="set model=mlp")
    if config.horizon and config.group_relative:
        raise CapabilityError(
            f"horizon cuts episodes, whose rewards advantage={config.advantage} compares", hint="set advantage=gae"
        )
    if config.kl_coef and not can.reference:
        raise CapabilityError("kl_coef needs a frozen reference, which the training backend does not keep")


def _samples_specially(config: RolloutConfig) -> bool:
    return config.sampling != "fast" or config.temperature != 1.0 or config.top_p < 1.0 or config.top_k > 0


@init_policy_session.validate
def _environment_exists(config: RolloutConfig) -> None:
    open_environment(config.env, config.env_options)


@stage(writes="data")
async def build_env_group(
    session: TrainingSession, config: ReinforcementPartsConfig, run: Run
) -> AsyncIterator[EnvironmentPool]:
    """Open the environments; they close when the workflow ends."""
    source, standing = open_environment(config.env, config.env_options), Standing()
    try:
        problems = await run_sync(lambda: len(source))
        if problems < 1:
            raise EmptyDataset(f"the environment {config.env!r} has no problems")
        pool = EnvironmentPool(
            source.name,
            await source.fingerprint(),
            source,
            rules_of(config, session),
            _rollouts(config, session, problems, run),
            standing,
        )
        decided = config.decided(session.capabilities)
        run.pin("environment", pool.fingerprint)
        run.pin("learner", decided["learner"])
        run.emit(
            EnvGroupBuilt(
                group_size=config.group_size,
                groups_per_batch=config.groups_per_batch,
                env_type=pool.name,
                problems=problems,
                fingerprint=pool.fingerprint,
                learner=decided["learner"],
                because=decided["learner_because"],
            )
        )
        yield pool
    finally:
        with anyio.CancelScope(shield=True):
            await standing.aclose()
            await source.aclose()


def rules_of(config: ReinforcementPartsConfig, session: TrainingSession) -> RolloutRules:
    """Return how groups are rolled out."""
    chat = config.template == "chat" or (config.template == "auto" and config.model != "mlp" and session.tokenizer.chat)
    return RolloutRules(
        group_size=config.group_size,
        least=least_members(config),
        max_tokens=config.max_tokens,
        max_turns=config.max_turns,
        horizon=config.horizon,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        mode=config.sampling,
        timeout=config.rollout_timeout,
        attempts=config.rollout_attempts,
        chat=chat,
        seed=config.seed,
    )


def least_members(config: ReinforcementPartsConfig) -> int:
    """Return how many members a group needs to be trained."""
    return config.min_group_size or (2 if config.group_relative else 1)


def _rollouts(
    config: ReinforcementPartsConfig, session: TrainingSession, problems: int, run: Run
) -> Rollouts[TrajectoryGroup]:
    in_order = config.max_staleness == 0 and (
        config.normalize == "running" or not session.capabilities.ordered_accumulation
    )
    plan = PipelinePlan(
        batches=config.num_rollouts,
        per_batch=config.groups_per_batch,
        max_staleness=config.max_staleness,
        staleness=config.staleness_policy,
        workers=config.concurrent_groups or config.groups_per_batch,
        in_order=in_order,
        quarantine_after=config.rollout_attempts,
        seed=config.seed,
    )
    order = problem_order(problems, config.seed, shuffle=config.shuffle)
    return Rollouts(plan, order=order, fatal=FATAL, dropped=lambda i, why: run.emit(GroupDropped(index=i, reason=why)))


@stage(writes="policy")
async def open_policy(session: TrainingSession, config: LearnerConfig) -> AsyncIterator[PublishedPolicy[Any]]:
    """Publish the weights as they are; rollouts always use the newest that were published."""
    sampler = await _newest(session)
    policy: PublishedPolicy[Any] = PublishedPolicy(sampler, session.position // config.steps_per_update)
    try:
        yield policy
    finally:
        await policy.aclose()


async def _newest(session: TrainingSession) -> Any:
    return await (session.policy() if session.info.model == "mlp" else session.sampler())


@stage()
async def do_rollout(
    ticket: Ticket, data: EnvironmentPool, policy: PublishedPolicy[Any], session: TrainingSession
) -> TrajectoryGroup:
    """Roll out one problem with the newest policy."""
    return await roller(data, policy, session, data.rules)(ticket)


def roller(
    data: EnvironmentPool, policy: PublishedPolicy[Any], session: TrainingSession, rules: RolloutRules
) -> Roller:
    """Return what rolls out the problems of a pool, by its rules or others."""
    language = session.info.model != "mlp"
    return Roller(
        data.source,
        policy,
        rules,
        tokenizer=session.tokenizer if language else None,
        context=session.info.context_length if language else 0,
        standing=data.standing,
    )


def rollout_feed(data: EnvironmentPool) -> Rollouts[TrajectoryGroup]:
    """The rollouts of the run, batch by batch."""
    return data.rollouts


@stage()
async def publish_policy(
    session: TrainingSession, policy: PublishedPolicy[Any], rollouts: Batch[TrajectoryGroup]
) -> None:
    """Make the trained weights those that are rolled out from now on, and give the places of what was trained free."""
    if len(rollouts):
        rollouts.rollouts.learner.enter("publish")
        await policy.publish(await _newest(session), rollouts.update + 1)
        rollouts.trained()


@stage(writes="rollout_metrics")
async def log_rollouts(rollouts: Batch[TrajectoryGroup], run: Run) -> dict[str, Any]:
    """Report what was rolled out for this update."""
    groups = sorted(rollouts.groups, key=lambda group: group.ticket.index)
    trajectories = [t for group in groups for t in group.trajectories]
    ended = [t for t in trajectories if not t.goes_on]
    rewards = np.array([t.reward for t in ended or trajectories])
    outcomes: dict[str, int] = {}
    for group in groups:
        for kind, count in group.kinds.items():
            outcomes[kind] = outcomes.get(kind, 0) + count
    measured: dict[str, Any] = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "num_trajectories": len(trajectories),
        "num_ended": len(ended),
        "tokens_mean": float(np.mean([t.actions for t in trajectories])),
        "env_seconds": sum(group.spent.get("environment", 0.0) for group in groups),
        "sampling_seconds": sum(group.spent.get("sampling", 0.0) for group in groups),
    }
    metrics = mean_metrics([t.metrics for t in trajectories])
    run.emit(
        RolloutComplete(
            **measured,
            rollout_index=rollouts.update,
            groups=[group.ticket.index for group in groups],
            seconds=[round(group.seconds, 6) for group in groups],
            outcomes=outcomes,
            metrics=metrics,
        )
    )
    return {**measured, "outcomes": outcomes, "metrics": metrics}


def mean_metrics(each: Sequence[Any]) -> dict[str, float]:
    """Return the means of what environments report, each over those that reported it."""
    names = sorted({name for metrics in each for name in metrics})
    return {name: float(np.mean([metrics[name] for metrics in each if name in metrics])) for name in names}
