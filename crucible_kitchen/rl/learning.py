"""From trajectories to datums: what has to be scored, what actions were worth, and what each token counts for.

Pure functions over groups. Read next: ``crucible_kitchen.stages.policy_update``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from crucible_kitchen.learner import (
    CISPO,
    GSPO,
    PPO,
    DecoupledPPO,
    EntropyBonus,
    ImportanceSampling,
    Term,
    ValueLoss,
    WeightedSum,
    centred,
    dr_grpo,
    gae,
    grpo,
    kl_shaped_rewards,
    maxrl,
    normalize,
    rloo,
    token_weights,
    truncated_importance_weights,
)
from crucible_kitchen.rl.config import LearnerConfig
from crucible_kitchen.rl.scales import Scales
from crucible_kitchen.rl.trajectories import Trajectory, TrajectoryGroup
from crucible_kitchen.types import Array, Datum, Float64Array, Loss, Output, OutputsLoss

__all__ = [
    "Scores",
    "TrainableGroup",
    "estimate",
    "in_value_units",
    "needed_scores",
    "policy_loss",
    "sampled_by",
    "sampler_mismatch",
    "scoring_datums",
    "settled",
    "whitened",
]

Scores: TypeAlias = Mapping[str, Sequence[Array]]
"""What the model says of a group's ``scoring_datums``, by name: ``values``, ``logprobs``, ``reference``."""

_RELATIVE = {"dr_grpo": dr_grpo, "rloo": rloo, "centred": centred, "maxrl": maxrl}


@dataclass(frozen=True, slots=True, eq=False)
class TrainableGroup:
    """A group as the learner takes it.

    Attributes:
        index: of its drawing.
        datums: one per trajectory.
        trajectories: what they were made of.
        advantages, returns: float64, of all positions where the policy acted, joined.
        divisor: what it adds to the number that the optimizer step divides by.
    """

    index: int
    datums: tuple[Datum, ...]
    trajectories: tuple[Trajectory, ...]
    advantages: Float64Array
    returns: Float64Array
    divisor: float


def needed_scores(config: LearnerConfig) -> frozenset[Output]:
    """Return the outputs that the model has to give for a batch before it is learned from."""
    needs: set[Output] = {"values"} if config.advantage == "gae" else set()
    if config.loss == "decoupled_ppo" or config.importance_cap is not None:
        needs.add("logprobs")
    return frozenset(needs)


def scoring_datums(group: TrajectoryGroup) -> list[Datum]:
    """Return one datum per trajectory with one position more than it has: of what followed its last action."""
    return [
        Datum(
            {name: np.concatenate([array, t.after[name]]) for name, array in t.inputs.items()},
            {"target_tokens": np.append(t.targets, 0), "weights": np.zeros(len(t) + 1, np.float32)},
            _key(group, i),
        )
        for i, t in enumerate(group.trajectories)
    ]


def estimate(
    group: TrajectoryGroup, config: LearnerConfig, scores: Scores, scales: Scales, *, max_length: int
) -> tuple[TrainableGroup, Scales]:
    """Return a group with the advantages of its actions, normalised, and its tokens' weights.

    Args:
        group: its trajectories.
        config: the method.
        scores: what ``needed_scores`` asks for, and ``reference`` with a KL term.
        scales: what advantages and values are measured by.
        max_length: the constant of the aggregation ``dr_grpo``, tokens.

    Returns:
        The group, not normalised over the batch (see ``whitened``), its values and returns in rewards (see
        ``in_value_units``); and the scales to go on with.
    """
    trajectories = group.trajectories
    rewards = [_rewards(t, i, config, scores) for i, t in enumerate(trajectories)]
    if config.advantage == "gae":
        values = [scales.value_unit * np.asarray(v, np.float64) for v in scores["values"]]
        found = [_gae(t, r, v, config) for t, r, v in zip(trajectories, rewards, values, strict=True)]
        advantages, returns = [f[0] for f in found], [f[1] for f in found]
        values = [v[: len(t)] for v, t in zip(values, trajectories, strict=True)]
    else:
        totals = np.array([r.sum() for r in rewards])
        of_group = grpo(totals, std=config.advantage_std) if config.advantage == "grpo" else _relative(config, totals)
        advantages = [a * t.mask for a, t in zip(of_group, trajectories, strict=True)]
        returns, values = [r * t.mask for r, t in zip(totals, trajectories, strict=True)], []
    if config.normalize in ("group", "running"):
        joined, mask = np.concatenate(advantages), np.concatenate([t.mask for t in trajectories])
        (joined,), moments = normalize([joined], config.normalize, masks=[mask], moments=scales.advantages)
        scales = replace(scales, advantages=moments)
        advantages = np.split(joined, np.cumsum([len(t) for t in trajectories])[:-1])
    datums = tuple(
        _datum(
            t, _key(group, i), advantages[i], returns[i], config, scores, i, values[i] if values else None, max_length
        )
        for i, t in enumerate(trajectories)
    )
    acted = [t.mask for t in trajectories]
    return (
        TrainableGroup(
            group.ticket.index,
            datums,
            tuple(trajectories),
            np.concatenate([a[m] for a, m in zip(advantages, acted, strict=True)]),
            np.concatenate([r[m] for r, m in zip(returns, acted, strict=True)]),
            sum(float(d.loss_inputs["divisor"][0]) for d in datums),
        ),
        scales,
    )


def settled(scales: Scales, groups: Sequence[TrainableGroup], config: LearnerConfig) -> Scales:
    """Return the scales with the value network's unit, if the method has one that these groups can decide."""
    if not config.normalizes_values or not groups:
        return scales
    return scales.settled_by(np.concatenate([g.returns for g in groups]))


def in_value_units(groups: Sequence[TrainableGroup], scales: Scales) -> list[TrainableGroup]:
    """Return groups whose datums have old values and returns as the value network is to say them."""
    if not scales.settled:
        return list(groups)
    return [replace(g, datums=tuple(_in_units_of(d, scales.value_unit) for d in g.datums)) for g in groups]


def whitened(groups: Sequence[TrainableGroup]) -> list[TrainableGroup]:
    """Return groups with their advantages normalised over the whole batch (``normalize=batch``)."""
    found, _ = normalize([g.advantages for g in groups], "batch")
    return [_with_advantages(g, a) for g, a in zip(groups, found, strict=True)]


def sampled_by(version: int, groups: Sequence[TrainableGroup]) -> list[Float64Array]:
    """Return the sampler's log-probabilities, [T] per datum; NaN where no policy sampled, or another than this."""
    return [
        np.where(t.mask & (t.versions == version), t.logprobs.astype(np.float64), np.nan)
        for group in groups
        for t in group.trajectories
    ]


def sampler_mismatch(sampled: Sequence[Float64Array], trained: Sequence[Array], before: float = np.nan) -> float:
    """Return by how much, at most, a policy's log-probabilities differ between its sampler and the training pass.

    Args:
        sampled: [T] per datum, see ``sampled_by``.
        trained: of the same tokens, [T] per datum, as the first optimizer step of an update computed them.
        before: what was found last.

    Returns:
        The greatest difference of a token, nats; ``before`` if the policy sampled none of them.
    """
    differences = np.abs(np.concatenate(sampled) - np.concatenate(trained))
    own = differences[~np.isnan(differences)]
    return float(own.max()) if len(own) else before


def policy_loss(config: LearnerConfig, *, exact_entropy: bool) -> Loss | OutputsLoss:
    """Return the whole loss of a method: the policy's, with value and entropy terms where it has them.

    Args:
        config: the method.
        exact_entropy: the backend gives the entropy of whole distributions; else it is estimated from what was sampled.
    """
    shared: dict[str, Any] = {
        "kl_coef": config.kl_coef if config.kl_in == "loss" else 0.0,
        "entropy_coef": 0.0 if exact_entropy else config.entropy_coef,
    }
    terms = [Term(_surrogate(config, shared))]
    if config.advantage == "gae":
        terms.append(Term(ValueLoss(clip=config.value_clip), "values", config.value_coef))
    if exact_entropy and config.entropy_coef:
        terms.append(Term(EntropyBonus(), "entropy", config.entropy_coef))
    return terms[0].loss if len(terms) == 1 else WeightedSum(*terms)


def _surrogate(config: LearnerConfig, shared: dict[str, Any]) -> Loss:
    if config.loss == "importance_sampling":
        return ImportanceSampling(**shared)
    if config.loss == "cispo":
        return CISPO(ratio_min=config.ratio_min, ratio_max=config.ratio_max, **shared)
    low = config.clip_epsilon if config.clip_epsilon is not None else (3e-4 if config.loss == "gspo" else 0.2)
    high = 4e-4 if config.loss == "gspo" and config.clip_epsilon is None else low
    clips: dict[str, Any] = {
        "clip_low": low,
        "clip_high": high if config.clip_epsilon_high is None else config.clip_epsilon_high,
    }
    if config.loss == "gspo":
        return GSPO(dual_clip=config.dual_clip, **clips, **shared)
    if config.loss == "decoupled_ppo":
        return DecoupledPPO(cap=config.behaviour_cap, dual_clip=config.dual_clip, **clips, **shared)
    return PPO(dual_clip=config.dual_clip, **clips, **shared)


def _rewards(t: Trajectory, i: int, config: LearnerConfig, scores: Scores) -> Float64Array:
    """Return the rewards, with the KL penalty where it counts there."""
    if not config.kl_coef or config.kl_in != "reward":
        return t.rewards
    reference = np.asarray(scores["reference"][i], np.float64)[: len(t)]
    return kl_shaped_rewards(t.rewards, t.logprobs, reference, coefficient=config.kl_coef, mask=t.mask)


def _gae(
    t: Trajectory, rewards: Float64Array, values: Float64Array, config: LearnerConfig
) -> tuple[Float64Array, Float64Array]:
    """Return advantages, and the returns that values learn, which may look further ahead."""
    over = np.zeros(len(t), dtype=bool)
    over[-1] = t.terminated
    cut = np.zeros(len(t), dtype=bool)
    cut[-1] = not t.terminated
    estimated = partial(
        gae,
        rewards,
        values[: len(t)],
        gamma=config.gamma,
        terminated=over,
        truncated=cut,
        bootstrap=values[len(t)],
        mask=t.mask,
    )
    return estimated(lam=config.gae_lambda).advantages, estimated(lam=config.value_lambda).returns


def _relative(config: LearnerConfig, totals: Float64Array) -> Float64Array:
    return _RELATIVE[config.advantage](totals)


def _datum(
    t: Trajectory,
    key: str,
    advantages: Float64Array,
    returns: Float64Array,
    config: LearnerConfig,
    scores: Scores,
    i: int,
    values: Float64Array | None,
    max_length: int,
) -> Datum:
    weights, divisor = token_weights(t.mask, config.weighting, max_length=max_length)
    inputs: dict[str, Array] = {
        "target_tokens": t.targets,
        "logprobs": t.logprobs,
        "advantages": advantages,
        "divisor": np.full(len(t), divisor),
    }
    if values is not None:
        inputs |= {"returns": returns, "values": values}
    if "logprobs" in scores:
        trainers = np.asarray(scores["logprobs"][i])[: len(t)]
        if config.loss == "decoupled_ppo":
            inputs["proximal_logprobs"] = trainers
        if config.importance_cap is not None:
            weights = weights * truncated_importance_weights(trainers, t.logprobs, t.mask, cap=config.importance_cap)
            inputs["logprobs"] = trainers
    if config.kl_coef and config.kl_in == "loss":
        inputs["reference_logprobs"] = np.asarray(scores["reference"][i])[: len(t)]
    return Datum(t.inputs, {**inputs, "weights": weights}, key)


def _with_advantages(group: TrainableGroup, advantages: Float64Array) -> TrainableGroup:
    """Return the group with other advantages where the policy acted."""
    datums, at = [], 0
    for d, mask in zip(group.datums, (t.mask for t in group.trajectories), strict=True):
        n = int(mask.sum())
        changed = np.zeros(len(d))
        changed[mask] = advantages[at : at + n]
        at += n
        datums.append(Datum(d.inputs, {**d.loss_inputs, "advantages": changed}, d.key))
    return replace(group, datums=tuple(datums), advantages=advantages)


def _in_units_of(datum: Datum, unit: float) -> Datum:
    learned = {name: np.asarray(datum.loss_inputs[name]) / unit for name in ("returns", "values")}
    return replace(datum, loss_inputs={**datum.loss_inputs, **learned})


def _key(group: TrajectoryGroup, member: int) -> str:
    return f"rollout/{group.ticket.index}/{member}"
