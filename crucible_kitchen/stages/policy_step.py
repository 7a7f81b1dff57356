"""One optimizer step of a policy on its way: what it is asked for, what comes back, and what is known before it.

It knows the training port, no batch and no report. Read next: ``policy_update.py``, which takes the steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from crucible_kitchen.config import AdamConfig
from crucible_kitchen.errors import NonFiniteLoss
from crucible_kitchen.ports import Pending, TrainingSession, TrainingStepScope
from crucible_kitchen.rl.config import LearnerConfig
from crucible_kitchen.rl.learning import Scores, needed_scores, policy_loss, scoring_datums
from crucible_kitchen.rl.scales import Scales
from crucible_kitchen.rl.trajectories import TrajectoryGroup
from crucible_kitchen.stages.rollout import ReinforcementPartsConfig
from crucible_kitchen.stages.training import step_rate
from crucible_kitchen.types import Array, Datum, ForwardBackwardResult, Loss, OutputsLoss, StepResult
from crucible_kitchen.workflow.run import Run

__all__ = ["PolicyStep", "Update", "UpdateConfig", "divisor_of", "loss_of", "scores_of"]


class UpdateConfig(ReinforcementPartsConfig, AdamConfig):
    """What an update depends on."""


@dataclass(frozen=True, slots=True)
class PolicyStep(StepResult):
    """The optimizer steps of one update; ``loss`` and rates are of the last.

    Attributes:
        policy: what all of them say of the policy: ``policy_loss``, ``value_loss``, ``entropy``, ``clip_fraction``...;
            and ``sampler_mismatch``, what the first found of its sampler.
        scales: what the next update's advantages and values are measured by.
    """

    policy: Mapping[str, float] = field(default_factory=dict)
    scales: Scales = field(default_factory=Scales)


class Update:
    """One optimizer step on its way.

    Args:
        session: takes it.
        config: how.
        divisor: what the sum of its gradients is divided by; may be set as late as ``apply``.

    Attributes:
        logprobs: of the tokens trained, [T] per datum in the order of submission, before the step; once applied.
    """

    def __init__(self, session: TrainingSession, config: UpdateConfig, divisor: float) -> None:
        self.index = session.position
        self.divisor = divisor
        self.logprobs: list[Array] = []
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

    async def apply(self, scope: TrainingStepScope, run: Run, scales: Scales) -> PolicyStep:
        """Apply the step and return what is reported of it."""
        config = self._config
        total_steps = config.num_rollouts * config.steps_per_update
        rate = step_rate(self.index, total_steps, config, self._session.info)
        applied = await scope.apply(config.adam(rate), scale=1.0 / self.divisor)
        found = [(place, await pending) for place, pending in self._pending]
        self.logprobs = [logprobs for _, result in found for logprobs in result.logprobs]
        results = [result for _, result in sorted(found, key=lambda pair: pair[0])]
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
            scales=scales,
        )


async def scores_of(session: TrainingSession, groups: Sequence[TrajectoryGroup], config: LearnerConfig) -> list[Scores]:
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


def loss_of(config: LearnerConfig, session: TrainingSession) -> Loss | OutputsLoss:
    """Return the loss that a config names, with the exact entropy where the backend has it."""
    return policy_loss(config, exact_entropy=session.capabilities.entropy)


def divisor_of(datums: Sequence[Datum]) -> float:
    """Return what a minibatch divides by."""
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
