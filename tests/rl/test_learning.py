"""From trajectories to datums: what actions were worth, what tokens count for, what the loss is made of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_kitchen.config import build_config
from crucible_kitchen.errors import ConfigError
from crucible_kitchen.learner import (
    CISPO,
    GSPO,
    PPO,
    DecoupledPPO,
    ImportanceSampling,
    WeightedSum,
    discounted_returns,
    gae,
    grpo,
    rloo,
)
from crucible_kitchen.rl.config import LearnerConfig
from crucible_kitchen.rl.learning import (
    estimate,
    in_value_units,
    needed_scores,
    policy_loss,
    sampled_by,
    sampler_mismatch,
    scoring_datums,
    settled,
    whitened,
)
from crucible_kitchen.rl.scales import Scales
from crucible_kitchen.rl.trajectories import EnvFault, Scored, Ticket, Trajectory, TrajectoryGroup, Truncated

MASK = np.array([False, True, True, False, True])
VALUES = np.array([0.1, 0.2, 0.3, 9.0, 0.5, 0.7])


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


def estimated(found, scores=None, scales=None, **values):
    return estimate(found, learner(**values), scores or {}, scales or Scales(), max_length=10)


def advantages(trainable):
    return [np.asarray(d.loss_inputs["advantages"]) for d in trainable.datums]


def test_group_relative_advantages_are_the_learner_s_spread_over_what_was_sampled():
    trainable, _ = estimated(group(1.0, 0.0, 0.0, 0.0), advantage="grpo")
    for found, wanted in zip(advantages(trainable), grpo([1.0, 0, 0, 0]), strict=True):
        assert found == pytest.approx(wanted * MASK, abs=0)


def test_a_sampler_s_mismatch_is_that_of_what_the_policy_that_is_updated_sampled_itself():
    trainable, _ = estimated(group(1.0, 0.0), advantage="grpo")
    trained = [np.array([7.0, -0.5, -0.4, 7.0, -0.55]), np.array([7.0, -0.5, -0.5, 7.0, -0.3])]
    assert sampler_mismatch(sampled_by(0, [trainable]), trained) == pytest.approx(0.2, rel=1e-6)
    assert sampler_mismatch(sampled_by(1, [trainable]), trained, 0.7) == 0.7, "an older policy's samples tell nothing"


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
        trainable, _ = estimated(found, {"values": values}, gamma=0.9, gae_lambda=0.8, value_lambda=0.8)
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


def test_values_learn_sums_of_rewards_to_the_end_whatever_lambda_advantages_have():
    for terminated in (True, False):
        found = TrajectoryGroup(Ticket(0, 0), (Truncated(trajectory(1.0, inner=4.0, terminated=terminated)),))
        one, other = (estimated(found, {"values": [VALUES]}, gamma=0.9, gae_lambda=lam)[0] for lam in (0.3, 0.8))
        sums = discounted_returns(
            [4.0, 0.0, 1.0], gamma=0.9, terminated=[False, False, terminated], bootstrap=VALUES[-1]
        )
        assert one.returns == pytest.approx(sums, abs=1e-12)
        assert list(one.returns) == list(other.returns)
        assert not np.allclose(one.advantages, other.advantages)


def test_values_are_read_in_the_units_that_their_network_computes_in():
    found = group(1.0)
    plain, _ = estimated(found, {"values": [VALUES]})
    other, scales = estimated(found, {"values": [VALUES / 4]}, Scales(value_unit=4.0, settled=True))
    assert other.advantages == pytest.approx(plain.advantages, abs=1e-12)
    assert other.returns == pytest.approx(plain.returns, abs=1e-12)
    (measured,) = in_value_units([other], scales)
    assert measured.datums[0].loss_inputs["returns"][MASK] == pytest.approx(plain.returns / 4, abs=1e-12)
    assert measured.datums[0].loss_inputs["values"] == pytest.approx(VALUES[:-1] / 4, abs=1e-12)
    assert list(measured.returns) == list(other.returns), "what is reported is in rewards"


@given(st.floats(1e-3, 1e3))
def test_in_units_of_the_first_returns_values_learn_the_same_whatever_a_reward_of_1_is_worth(scale):
    config = {"ppo_epochs": 2, "normalize": "batch"}
    scores = {"values": [np.zeros(6)] * 2}
    learned = []
    for factor in (1.0, scale):
        found = [
            estimated(group(3 * factor, -factor, index=i, inner=i * factor), scores, **config)[0] for i in range(2)
        ]
        scales = settled(Scales(), found, learner(**config))
        datums = [d for g in whitened(in_value_units(found, scales)) for d in g.datums]
        learned.append([np.concatenate([d.loss_inputs[k][MASK] for d in datums]) for k in ("returns", "advantages")])
    assert np.square(learned[0][0]).mean() == pytest.approx(1.0, abs=1e-12)
    assert learned[1][0] == pytest.approx(learned[0][0], abs=1e-9)
    assert learned[1][1] == pytest.approx(learned[0][1], rel=1e-2), "but for the epsilon in the divisor"


def test_the_unit_is_the_root_mean_square_of_the_first_returns_that_are_not_all_0_and_stays():
    config, scores = learner(ppo_epochs=2), {"values": [np.zeros(6)] * 2}
    zeros, first, later = (
        estimated(group(*rewards), scores, ppo_epochs=2, gamma=1.0)[0]
        for rewards in ((0.0, 0.0), (1.0, 7.0), (50.0, 90.0))
    )
    nothing = settled(Scales(), [], config)
    unknown = settled(nothing, [zeros], config)
    assert nothing == unknown == Scales()
    assert in_value_units([zeros], unknown) == [zeros]
    known = settled(unknown, [first], config)
    assert known == Scales(value_unit=5.0, settled=True)
    assert settled(known, [later], config) == known


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, False),
        ({"ppo_epochs": 2}, True),
        ({"minibatches": 2}, True),
        ({"normalize_values": True}, True),
        ({"normalize_values": False, "ppo_epochs": 2}, False),
        ({"advantage": "grpo", "ppo_epochs": 2}, False),
    ],
)
def test_values_are_normalised_where_an_update_takes_several_steps_unless_told_otherwise(values, wanted):
    config = learner(**values)
    assert config.normalizes_values is wanted
    found, _ = estimated(group(1.0, 3.0), {"values": [np.zeros(6)] * 2}, **values)
    assert settled(Scales(), [found], config).settled is wanted


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
    one, scales = estimated(groups[0], advantage="centred", normalize="running")
    two, after = estimated(groups[1], scales=scales, advantage="centred", normalize="running")
    assert (scales.advantages.count, after.advantages.count) == (6, 12)
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
        ({"learner": "streaming", "normalize_values": True}, "streaming is not possible: normalize_values"),
        ({"advantage": "rloo", "normalize_values": False}, "normalize_values belongs to advantage=gae"),
        ({"advantage": "rloo", "value_lambda": 0.9}, "value_lambda belongs to advantage=gae"),
        ({"loss": "cispo", "ratio_min": 5.0}, "ratio_min is above ratio_max"),
    ],
)
def test_a_key_that_the_method_does_not_use_is_refused_when_it_is_given(values, says):
    with pytest.raises(ConfigError, match=says):
        learner(**values)
