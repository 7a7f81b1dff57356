"""Rollout stages: open the environments and the policy, roll out problems, publish new weights, measure the policy.

They know the environment port and a session's samplers, nothing of losses. Read next: ``crucible_kitchen.rl.pipeline``.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio
import numpy as np
from pydantic import Field

from crucible_kitchen.config import CheckpointConfig, ModelConfig, RunConfig
from crucible_kitchen.errors import CapabilityError, ConfigError, EmptyDataset
from crucible_kitchen.events import EnvGroupBuilt, GroupDropped, PolicyEvaluated, RolloutComplete
from crucible_kitchen.ports import BlobStore, EnvironmentSource, ModelRegistry, TrainingClient, TrainingSession
from crucible_kitchen.rl.config import LearnerConfig, RolloutConfig
from crucible_kitchen.rl.environments import open_environment
from crucible_kitchen.rl.pipeline import Batch, Rollouts
from crucible_kitchen.rl.plan import PipelinePlan
from crucible_kitchen.rl.policy import PublishedPolicy
from crucible_kitchen.rl.rollout import FATAL, Roller, RolloutRules
from crucible_kitchen.rl.staleness import problem_order
from crucible_kitchen.rl.trajectories import Ticket, TrajectoryGroup
from crucible_kitchen.stages.training import local_model, session_spec
from crucible_kitchen.types import MlpSpec, StepResult
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "EnvironmentPool",
    "PolicyEvalConfig",
    "ReinforcementPartsConfig",
    "build_env_group",
    "do_rollout",
    "evaluate_policy",
    "init_policy_session",
    "log_rollouts",
    "open_policy",
    "policy_eval_at_start",
    "policy_eval_due",
    "publish_policy",
    "rollout_feed",
    "update_checkpoint_due",
]


class PolicyEvalConfig(RunConfig):
    """When the policy is measured on problems that it is not trained on."""

    eval_size: int = Field(default=100, ge=1)
    """At most this many problems are tried, greedily."""

    eval_every: int = Field(default=0, ge=0)
    """Also evaluate every so many optimizer steps, after the update that reaches them; 0: only at the end."""

    eval_at_start: bool = False
    """Also evaluate before the first update."""


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
    """

    name: str
    fingerprint: str
    source: EnvironmentSource
    rules: RolloutRules
    rollouts: Rollouts[TrajectoryGroup]


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
    can = training_client.capabilities
    if config.lora() is None and not can.full_weights:
        raise CapabilityError("the training backend cannot train all weights", hint="set lora_rank=16")
    if config.lora() is not None and not can.lora:
        raise CapabilityError("the training backend cannot train LoRA adapters", hint="set lora_rank=0")
    if config.model != "mlp" and not can.sampling:
        raise CapabilityError("the training backend cannot sample, so nothing can be rolled out")
    if config.model == "mlp" and not can.mlp:
        raise CapabilityError("the training backend has no policy over observations", hint="use training_client=torch")
    if config.advantage == "gae" and not can.value_head:
        raise CapabilityError(
            "advantage=gae needs a value head, which the training backend does not have",
            hint="write advantage=grpo (or dr_grpo, rloo, centred), which compares the rollouts of one problem",
        )
    if config.kl_coef and not can.reference:
        raise CapabilityError("kl_coef needs a frozen reference, which the training backend does not keep")


@init_policy_session.validate
def _environment_exists(config: RolloutConfig) -> None:
    open_environment(config.env, config.env_options)


@stage(writes="data")
async def build_env_group(
    session: TrainingSession, config: ReinforcementPartsConfig, run: Run
) -> AsyncIterator[EnvironmentPool]:
    """Open the environments; they close when the workflow ends."""
    source = open_environment(config.env, config.env_options)
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
        )
        run.emit(
            EnvGroupBuilt(
                group_size=config.group_size,
                groups_per_batch=config.groups_per_batch,
                env_type=pool.name,
                problems=problems,
                fingerprint=pool.fingerprint,
                learner="batch" if (why := batch_because(config, session)) else "streaming",
                because=why or "each group's gradient depends on that group alone",
            )
        )
        yield pool
    finally:
        with anyio.CancelScope(shield=True):
            await source.aclose()


def rules_of(config: ReinforcementPartsConfig, session: TrainingSession) -> RolloutRules:
    """Return how groups are rolled out."""
    chat = config.template == "chat" or (config.template == "auto" and config.model != "mlp" and session.tokenizer.chat)
    return RolloutRules(
        group_size=config.group_size,
        least=least_members(config),
        max_tokens=config.max_tokens,
        max_turns=config.max_turns,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        mode=config.sampling,
        timeout=config.rollout_timeout,
        attempts=config.rollout_attempts,
        chat=chat,
        seed=config.seed,
    )


def batch_because(config: LearnerConfig, session: TrainingSession) -> str | None:
    """Return why a batch is collected before it is learned from; None if groups are taken as they arrive."""
    if config.learner == "batch":
        return "learner=batch"
    if session.capabilities.step_scale != "exact":
        return "the backend cannot scale a step by a number known only then"
    return config.must_batch()


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
    return await _roller(data, policy, session, data.rules)(ticket)


def _roller(
    data: EnvironmentPool, policy: PublishedPolicy[Any], session: TrainingSession, rules: RolloutRules
) -> Roller:
    language = session.info.model != "mlp"
    return Roller(
        data.source,
        policy,
        rules,
        tokenizer=session.tokenizer if language else None,
        context=session.info.context_length if language else 0,
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
    rewards = np.array([t.reward for t in trajectories])
    outcomes: dict[str, int] = {}
    for group in groups:
        for kind, count in group.kinds.items():
            outcomes[kind] = outcomes.get(kind, 0) + count
    measured: dict[str, Any] = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "num_trajectories": len(trajectories),
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


class EvaluatedPartsConfig(ReinforcementPartsConfig, PolicyEvalConfig, CheckpointConfig):
    """What measuring the policy depends on."""


def policy_eval_due(step: StepResult, config: EvaluatedPartsConfig) -> bool:
    """Whether the policy is measured after this update."""
    return _reached(config.eval_every, step, config)


def update_checkpoint_due(step: StepResult, config: EvaluatedPartsConfig) -> bool:
    """Whether the training state is saved after this update."""
    return _reached(config.save_every, step, config)


def _reached(every: int, step: StepResult, config: LearnerConfig) -> bool:
    """Return whether one of an update's optimizer steps is a multiple of ``every``."""
    return bool(every) and step.step // every > (step.step - config.steps_per_update) // every


def policy_eval_at_start(config: PolicyEvalConfig) -> bool:
    """Whether the policy is measured before the first update."""
    return config.eval_at_start


@stage(writes="eval_results")
async def evaluate_policy(
    session: TrainingSession, data: EnvironmentPool, policy: PublishedPolicy[Any], config: PolicyEvalConfig, run: Run
) -> dict[str, Any]:
    """Try held-out problems greedily; where an environment has none, its problems with seeds of their own."""
    held_out = await run_sync(data.source.held_out)
    source = held_out if held_out is not None else data.source
    rules = replace(data.rules, group_size=1, least=1, temperature=0.0, top_p=1.0, top_k=0, seed=config.seed + 1)
    roller = _roller(replace(data, source=source), policy, session, rules)
    count = min(config.eval_size, await run_sync(lambda: len(source)))
    groups: list[TrajectoryGroup | None] = [None] * count
    slots = anyio.CapacityLimiter(32)

    async def attempt(index: int) -> None:
        async with slots:
            groups[index] = await roller(Ticket(index, index))

    async with anyio.create_task_group() as tasks:
        for index in range(count):
            tasks.start_soon(attempt, index)
    if held_out is not None:
        await held_out.aclose()
    return _evaluated([g for g in groups if g is not None], session, run, held_out=held_out is not None)


def _evaluated(
    groups: Sequence[TrajectoryGroup], session: TrainingSession, run: Run, *, held_out: bool
) -> dict[str, Any]:
    trajectories = [t for group in groups for t in group.trajectories]
    rewards = np.array([t.reward for t in trajectories])
    mean, std = (float(rewards.mean()), float(rewards.std())) if len(rewards) else (float("nan"), float("nan"))
    run.emit(
        PolicyEvaluated(
            reward_mean=mean,
            reward_std=std,
            episodes=len(rewards),
            step=session.position,
            held_out=held_out,
            label=run.path.rpartition("/")[2],
        )
    )
    return {
        "reward_mean": mean,
        "reward_std": std,
        "episodes": len(rewards),
        "failed": len(groups) - len(trajectories),
        "held_out": held_out,
        "metrics": mean_metrics([t.metrics for t in trajectories]),
        "step": session.position,
        "synthetic": session.capabilities.synthetic,
    }
