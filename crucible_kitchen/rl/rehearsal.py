"""Rehearsal: the real pipeline with recorded or assumed latencies and no model, in simulated time.

What it predicts is how rollouts and learning overlap, not what is learned. Read next: ``crucible_kitchen.rl.pipeline``.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio
import numpy as np

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.rl.config import LearnerConfig, RolloutConfig
from crucible_kitchen.rl.pipeline import Rollouts
from crucible_kitchen.rl.plan import PipelinePlan
from crucible_kitchen.rl.trajectories import Ticket
from crucible_kitchen.rl.virtual import run_virtually
from crucible_kitchen.types import Array, JsonObject

__all__ = ["Latencies", "Prices", "Rehearsal", "RehearsalConfig", "rehearse"]


class RehearsalConfig(RolloutConfig, LearnerConfig):
    """The keys of a run that decide how its parts overlap; the others are accepted and change nothing here."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """How long things take, in seconds.

    Attributes:
        rollouts: recorded times of groups, drawn from at random; empty: log-normal.
        rollout_mean, rollout_sigma: of the log-normal, of one group.
        update: of one update, the whole batch's.
        publish: of publishing new weights.
        tokens: sampled by a group, for prices; 0: unknown.
    """

    rollouts: Sequence[float] = ()
    rollout_mean: float = 1.0
    rollout_sigma: float = 0.5
    update: float = 1.0
    publish: float = 0.0
    tokens: float = 0.0

    def __post_init__(self) -> None:
        numbers = (*self.rollouts, self.rollout_mean, self.update, self.publish)
        if not all(math.isfinite(x) and x >= 0 for x in numbers) or self.rollout_sigma < 0 or not self.rollout_mean:
            raise ConfigError("latencies are seconds, 0 or more, and a rollout takes some time")

    def sampler(self, seed: int) -> Callable[[], float]:
        """Return a function that draws the time of a group."""
        rng = random.Random(seed)
        if self.rollouts:
            return lambda: rng.choice(self.rollouts)
        mu = math.log(self.rollout_mean) - self.rollout_sigma**2 / 2
        return lambda: rng.lognormvariate(mu, self.rollout_sigma)


@dataclass(frozen=True, slots=True)
class Prices:
    """What a run costs: per hour of its machines, and per million sampled tokens."""

    hour: float = 0.0
    million_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a run would be like.

    Attributes:
        steps: updates.
        seconds: of the whole run.
        step_seconds: of one update, the mean.
        efficiency: overlap efficiency: 1 if either the learner or all workers were busy all the time.
        learner: seconds by cause.
        staleness: groups by age in updates.
        waste: share of the rollouts that is given up.
        cost: by the prices; None without.
        streaming: the learner takes groups as they arrive.
    """

    steps: int
    seconds: float
    step_seconds: float
    efficiency: float
    learner: Mapping[str, float]
    staleness: Mapping[int, int]
    waste: float
    cost: float | None
    streaming: bool
    dropped: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return it as JSON."""
        ages = {str(age): n for age, n in sorted(self.staleness.items())}
        total = sum(self.staleness.values())
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "overlap_efficiency": self.efficiency,
            "learner_seconds": dict(self.learner),
            "staleness": ages,
            "staleness_mean": sum(age * n for age, n in self.staleness.items()) / max(1, total),
            "staleness_max": max(self.staleness, default=0),
            "waste": self.waste,
            "dropped": dict(self.dropped),
            "learner": "streaming" if self.streaming else "batch",
            "cost": self.cost,
        }


class _Group:
    """A group that is nothing but its time and its version."""

    __slots__ = ("_version", "seconds", "ticket")
    unusable = carried = None
    length = 1

    def __init__(self, ticket: Ticket, version: int, seconds: float) -> None:
        self.ticket = ticket
        self.seconds = seconds
        self._version = version

    def versions(self) -> Array:
        """Return its one version."""
        return np.array((self._version,))


def rehearse(config: RehearsalConfig, latencies: Latencies, prices: Prices | None = None) -> Rehearsal:
    """Run the pipeline of a config in simulated time.

    Args:
        config: of the run; ``num_rollouts`` updates are simulated.
        latencies: how long things take.
        prices: what they cost.
    """
    streaming = config.learner != "batch" and config.must_batch() is None
    return run_virtually(lambda: _rehearsed(config, latencies, prices, streaming=streaming))


async def _rehearsed(
    config: RehearsalConfig, latencies: Latencies, prices: Prices | None, *, streaming: bool
) -> Rehearsal:
    plan = PipelinePlan(
        batches=config.num_rollouts,
        per_batch=config.groups_per_batch,
        max_staleness=config.max_staleness,
        staleness=config.staleness_policy,
        workers=config.concurrent_groups or config.groups_per_batch,
        seed=config.seed,
    )
    rollouts: Rollouts[_Group] = Rollouts(plan, order=lambda index: index)
    draw = latencies.sampler(config.seed)

    async def produce(ticket: Ticket) -> _Group:
        seconds, version = draw(), rollouts.version
        await anyio.sleep(seconds)
        return _Group(ticket, version, seconds)

    async with rollouts.running(produce):
        async for batch in rollouts:
            async for _ in batch:
                if streaming:
                    await anyio.sleep(latencies.update / plan.per_batch)
            if not streaming:
                await anyio.sleep(latencies.update)
            rollouts.learner.enter("publish")
            if latencies.publish:
                await anyio.sleep(latencies.publish)
            batch.trained()
        return _report(rollouts, latencies, prices, streaming=streaming)


def _report(rollouts: Rollouts[_Group], latencies: Latencies, prices: Prices | None, *, streaming: bool) -> Rehearsal:
    wall, ledger = rollouts.learner.wall, rollouts.ledger
    cost = None
    if prices is not None:
        cost = prices.hour * wall / 3600 + prices.million_tokens * ledger.drawn * latencies.tokens / 1e6
    return Rehearsal(
        steps=rollouts.version,
        seconds=wall,
        step_seconds=wall / max(1, rollouts.version),
        efficiency=rollouts.efficiency,
        learner=rollouts.learner.spent(),
        staleness=dict(rollouts.measured.staleness),
        waste=ledger.dropped.total() / max(1, ledger.drawn),
        cost=cost,
        streaming=streaming,
        dropped=dict(ledger.dropped),
    )
