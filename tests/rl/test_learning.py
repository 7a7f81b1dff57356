"""From trajectories to datums: what actions were worth, what tokens count for, what the loss is made of."""

import numpy as np
import pytest

from crucible_kitchen.config import build_config
from crucible_kitchen.errors import ConfigError
from crucible_kitchen.learner import (
    CISPO,
    GSPO,
    PPO,
    DecoupledPPO,
    ImportanceSampling,
    Moments,
    WeightedSum,
    gae,
    grpo,
    rloo,
)
from crucible_kitchen.rl.config import LearnerConfig
from crucible_kitchen.rl.learning import estimate, needed_scores, policy_loss, scoring_datums, whitened
from crucible_kitchen.rl.trajectories import EnvFault, Scored, Ticket, Trajectory, TrajectoryGroup, Truncated

MASK = np.array([False, True, True, False, True])


def trajectory(reward, *, terminated=True, mask=MASK, inner=0.0):
    n = len(mask)
    rewards = np.zeros(n)
    rewards[np.flatnonzero(mask)[-1]] = reward
    rewards[np.flatnonzero(mask)[0]] += inner
    return Trajectory(
        inputs={"tokens": np.arange(n)},
        after={"tokens": np.array([n])},
        targets=np.arange(1, n + 1),
        mask=mask,
        logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        rewards=rewards,
        terminated=terminated,
    )


def group(*rewards, index=0, faults=0, **options):
    outcomes = [Scored(trajectory(r, **options)) for r in rewards] + [EnvFault("x")] * faults
    return TrajectoryGroup(Ticket(index, 0), tuple(outcomes))


def learner(**values):
    return build_config(LearnerConfig, values)


def estimated(found, scores=None, moments=None, **values):
    return estimate(found, learner(**values), scores or {}, moments or Moments(), max_length=10)


def advantages(trainable):
    return [np.asarray(d.loss_inputs["advantages"]) for d in trainable.datums]


def test_group_relative_advantages_are_the_learner_s_spread_over_what_was_sampled():
    trainable, _ = estimated(group(1.0, 0.0, 0.0, 0.0), advantage="grpo")
    for found, wanted in zip(advantages(trainable), grpo([1.0, 0, 0, 0]), strict=True):
        assert found == pytest.approx(wanted * MASK, abs=0)


def test_a_baseline_uses_the_members_that_are_there():
    trainable, _ = estimated(group(1.0, 0.0, faults=6), advantage="rloo")
    assert [a[1] for a in advantages(trainable)] == list(rloo([1.0, 0.0])) == [1.0, -1.0]


def test_a_group_of_equal_rewards_gives_exactly_nothing():
    for advantage in ("grpo", "dr_grpo", "rloo", "centred", "maxrl"):
        trainable, _ = estimated(group(*[0.1] * 8), advantage=advantage)
        assert not np.concatenate(advantages(trainable)).any()


def test_gae_removes_holes_and_takes_the_value_of_what_followed_a_cut():
    values = [np.array([0.1, 0.2, 0.3, 9.0, 0.5, 0.7])]
    for terminated in (True, False):
        found = TrajectoryGroup(Ticket(0, 0), (Truncated(trajectory(1.0, terminated=terminated)),))
        trainable, _ = estimated(found, {"values": values}, gamma=0.9, gae_lambda=0.8)
        wanted = gae(
            [0.0, 0.0, 1.0],
            [0.2, 0.3, 0.5],
            gamma=0.9,
            lam=0.8,
            terminated=[False, False, terminated],
            bootstrap=0.7,
        )
        (datum,) = trainable.datums
        assert datum.loss_inputs["advantages"][MASK] == pytest.approx(wanted.advantages, abs=1e-12)
        assert datum.loss_inputs["returns"][MASK] == pytest.approx(wanted.returns, abs=1e-12)
        assert list(datum.loss_inputs["values"]) == list(values[0][:5])


def test_what_has_to_be_scored_is_one_position_longer_than_the_trajectory():
    (datum,) = scoring_datums(group(1.0))
    assert list(datum.inputs["tokens"]) == [0, 1, 2, 3, 4, 5]
    assert len(datum.loss_inputs["target_tokens"]) == 6
    assert needed_scores(learner(advantage="grpo")) == frozenset()
    assert needed_scores(learner()) == {"values"}
    assert needed_scores(learner(advantage="grpo", loss="decoupled_ppo")) == {"logprobs"}


def test_the_kl_penalty_counts_in_the_reward_or_in_the_loss():
    reference = [np.full(6, -0.7)] * 2
    trainable, _ = estimated(group(1.0, 0.0), {"reference": reference}, advantage="centred", kl_coef=0.1)
    shaped = np.array([1.0, 0.0]) - 0.1 * 3 * (-0.5 + 0.7)
    assert [a[1] for a in advantages(trainable)] == pytest.approx(list(shaped - shaped.mean()))
    assert "reference_logprobs" not in trainable.datums[0].loss_inputs
    trainable, _ = estimated(group(1.0, 0.0), {"reference": reference}, advantage="centred", kl_coef=0.1, kl_in="loss")
    assert [a[1] for a in advantages(trainable)] == [0.5, -0.5]
    assert list(trainable.datums[0].loss_inputs["reference_logprobs"]) == [-0.7] * 5


@pytest.mark.parametrize(
    ("values", "weight", "divisor"),
    [
        ({"advantage": "grpo"}, 1.0, 6.0),
        ({"advantage": "dr_grpo"}, 0.1, 2.0),
        ({"advantage": "grpo", "loss": "gspo"}, 1 / 3, 2.0),
        ({"advantage": "grpo", "aggregation": "sequence_sum"}, 1.0, 2.0),
        ({"advantage": "dr_grpo", "aggregation": "token_mean"}, 1.0, 6.0),
    ],
)
def test_tokens_count_as_the_method_has_it(values, weight, divisor):
    trainable, _ = estimated(group(1.0, 0.0), **values)
    assert trainable.datums[0].loss_inputs["weights"] == pytest.approx(weight * MASK)
    assert trainable.divisor == pytest.approx(divisor)


def test_importance_weights_correct_for_a_sampler_with_other_numbers():
    scores = {"logprobs": [np.array([-0.5, -0.5, 1.5, -0.5, -0.9, 0.0])] * 2}
    trainable, _ = estimated(group(1.0, 0.0), scores, advantage="grpo", importance_cap=2.0)
    inputs = trainable.datums[0].loss_inputs
    assert inputs["weights"] == pytest.approx([0, 1, 2.0, 0, np.exp(-0.4)])
    assert list(inputs["logprobs"]) == [-0.5, -0.5, 1.5, -0.5, -0.9]
    trainable, _ = estimated(group(1.0, 0.0), scores, advantage="grpo", loss="decoupled_ppo")
    inputs = trainable.datums[0].loss_inputs
    assert list(inputs["proximal_logprobs"]) == [-0.5, -0.5, 1.5, -0.5, -0.9]
    assert list(inputs["logprobs"][MASK]) == [-0.5] * 3


def test_running_moments_depend_on_earlier_groups_only_and_go_on():
    groups = [group(1.0, 0.0, index=0), group(3.0, 0.0, index=1)]
    one, moments = estimated(groups[0], advantage="centred", normalize="running")
    two, after = estimated(groups[1], moments=moments, advantage="centred", normalize="running")
    assert (moments.count, after.count) == (6, 12)
    alone, _ = estimated(groups[1], advantage="centred", normalize="running")
    assert advantages(two)[0][1] != advantages(alone)[0][1]
    assert np.std(np.concatenate([a[MASK] for a in advantages(one)]), ddof=1) == pytest.approx(1.0)


def test_whitening_goes_over_the_whole_batch_and_over_nothing_but_what_was_sampled():
    groups = [estimated(group(4.0, 0.0, index=i), advantage="centred", normalize="batch")[0] for i in range(2)]
    found = whitened(groups)
    joined = np.concatenate([a[MASK] for g in found for a in advantages(g)])
    assert joined.mean() == pytest.approx(0.0, abs=1e-12)
    assert joined.std(ddof=1) == pytest.approx(1.0, abs=1e-6)
    assert not any(a[~MASK].any() for g in found for a in advantages(g))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, PPO(clip_low=0.2, clip_high=0.2)),
        (
            {"clip_epsilon": 0.1, "clip_epsilon_high": 0.3, "dual_clip": 3.0},
            PPO(clip_low=0.1, clip_high=0.3, dual_clip=3),
        ),
        ({"loss": "importance_sampling"}, ImportanceSampling()),
        ({"loss": "cispo", "ratio_max": 2.0}, CISPO(ratio_max=2.0)),
        ({"loss": "gspo"}, GSPO()),
        ({"loss": "gspo", "clip_epsilon": 0.1}, GSPO(clip_low=0.1, clip_high=0.1)),
        ({"loss": "decoupled_ppo", "behaviour_cap": 2.0}, DecoupledPPO(clip_low=0.2, clip_high=0.2, cap=2.0)),
        ({"kl_coef": 0.1, "kl_in": "loss", "entropy_coef": 0.01}, PPO(kl_coef=0.1, entropy_coef=0.01)),
        ({"kl_coef": 0.1}, PPO()),
    ],
)
def test_the_loss_is_the_one_that_the_keys_describe(values, wanted):
    assert policy_loss(learner(advantage="grpo", **values), exact_entropy=False) == wanted


def test_a_config_that_was_stored_with_every_key_is_the_same_one():
    for values in (
        {"advantage": "grpo"},
        {"advantage": "rloo", "loss": "gspo"},
        {"advantage": "centred", "loss": "cispo", "kl_coef": 0.1},
    ):
        config = learner(**values)
        stored = build_config(LearnerConfig, config.model_dump(mode="json"))
        assert policy_loss(stored, exact_entropy=False) == policy_loss(config, exact_entropy=False)
        assert stored == config


def test_values_and_exact_entropy_are_terms_of_their_own():
    loss = policy_loss(learner(entropy_coef=0.01, value_coef=0.25, value_clip=0.1), exact_entropy=True)
    assert isinstance(loss, WeightedSum)
    assert [(t.loss.name, t.of, t.coefficient) for t in loss.terms] == [
        ("ppo", "logprobs", 1.0),
        ("value", "values", 0.25),
        ("entropy", "entropy", 0.01),
    ]
    assert loss.terms[0].loss.entropy_coef == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"advantage": "grpo", "gamma": 0.9}, "gamma belongs to advantage=gae"),
        ({"advantage": "rloo", "value_clip": 0.9}, "value_clip belongs to advantage=gae"),
        ({"advantage_std": "verl"}, "advantage_std belongs to advantage=grpo"),
        ({"loss": "cispo", "clip_epsilon": 0.1}, "clip_epsilon belongs to loss=ppo"),
        ({"ratio_max": 2.0}, "ratio_max belongs to loss=cispo"),
        ({"behaviour_cap": 2.0}, "behaviour_cap belongs to loss=decoupled_ppo"),
        ({"kl_in": "loss"}, "kl_in has no meaning without kl_coef"),
        ({"learner": "streaming", "ppo_epochs": 2}, "streaming is not possible"),
        ({"learner": "streaming", "normalize": "batch"}, "streaming is not possible"),
        ({"loss": "cispo", "ratio_min": 5.0}, "ratio_min is above ratio_max"),
    ],
)
def test_a_key_that_the_method_does_not_use_is_refused_when_it_is_given(values, says):
    with pytest.raises(ConfigError, match=says):
        learner(**values)
