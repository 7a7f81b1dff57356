"""Sums of losses of several outputs: totals, derivatives and metrics are those of their terms."""

import numpy as np
import pytest

from crucible_kitchen.learner import DPO, PPO, BradleyTerry, EntropyBonus, Term, ValueLoss, WeightedSum
from crucible_kitchen.learner.terms import of_outputs
from crucible_kitchen.types import reads

RNG = np.random.default_rng(0)
T = 5
INPUTS = {
    "weights": np.array([0, 1, 1, 0.5, 1], np.float32),
    "advantages": RNG.normal(size=T),
    "logprobs": RNG.normal(size=T) - 2,
    "returns": RNG.normal(size=T),
}


def outputs(seed=1):
    rng = np.random.default_rng(seed)
    return {"logprobs": rng.normal(size=T) - 2, "values": rng.normal(size=T), "entropy": rng.random(T) + 1}


def test_a_sum_reads_what_its_terms_read():
    loss = WeightedSum(Term(PPO()), Term(ValueLoss(), "values", 0.5), Term(EntropyBonus(), "entropy", 0.01))
    assert loss.reads == {"logprobs", "values", "entropy"} == reads(loss)
    assert reads(PPO()) == reads("cross_entropy") == {"logprobs"}
    assert loss.name == "ppo+value+entropy"


def test_totals_and_derivatives_are_weighted_sums():
    own = outputs()
    loss = WeightedSum(Term(PPO()), Term(ValueLoss(), "values", 0.5), Term(EntropyBonus(), "entropy", 0.01))
    value = loss([own], [INPUTS])
    policy, critic = PPO()([own["logprobs"]], [INPUTS]), ValueLoss()([own["values"]], [INPUTS])
    entropy = float(INPUTS["weights"] @ own["entropy"])
    assert value.total == pytest.approx(policy.total + 0.5 * critic.total - 0.01 * entropy, abs=1e-12)
    assert np.array_equal(value.slopes[0]["logprobs"], policy.d_logprobs[0])
    assert np.array_equal(value.slopes[0]["values"], 0.5 * critic.d_logprobs[0])
    assert np.allclose(value.slopes[0]["entropy"], -0.01 * INPUTS["weights"], atol=1e-12)
    assert value.metrics["policy_loss"] == policy.metrics["policy_loss"]
    assert value.metrics["value_loss"] == critic.metrics["value_loss"]
    assert value.metrics["exact_entropy"] == pytest.approx(own["entropy"][[1, 2, 3, 4]].sum())


@pytest.mark.parametrize("output", ["logprobs", "values", "entropy"])
def test_the_derivatives_are_those_of_the_total(output):
    own = outputs()
    loss = WeightedSum(
        Term(PPO(), coefficient=2.0), Term(ValueLoss(clip=None), "values"), Term(EntropyBonus(), "entropy")
    )
    slopes = loss([own], [INPUTS]).slopes[0][output]
    for t in range(T):
        ends = []
        for sign in (1, -1):
            moved = own[output].copy()
            moved[t] += sign * 1e-6
            ends.append(loss([own | {output: moved}], [INPUTS]).total)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slopes[t], abs=1e-7)


def test_two_terms_of_one_output_add_their_derivatives():
    own = outputs()
    twice = WeightedSum(Term(PPO()), Term(PPO(), coefficient=0.5))([own], [INPUTS])
    once = PPO()([own["logprobs"]], [INPUTS])
    assert twice.total == pytest.approx(1.5 * once.total)
    assert np.allclose(twice.slopes[0]["logprobs"], 1.5 * once.d_logprobs[0])
    assert twice.metrics["tokens"] == 2 * once.metrics["tokens"]
    assert twice.metrics["ratio:max"] == once.metrics["ratio:max"]


def test_terms_of_single_datums_are_evaluated_on_each_of_a_pair():
    pair = [outputs(1), outputs(2)]
    inputs = [INPUTS | {"reference_logprobs": np.zeros(T)}] * 2
    value = WeightedSum(Term(DPO()), Term(EntropyBonus(), "entropy"))(pair, inputs)
    assert WeightedSum(Term(DPO()), Term(EntropyBonus(), "entropy")).group == 2
    each = [EntropyBonus()([own["entropy"]], [INPUTS]).total for own in pair]
    assert value.total == pytest.approx(DPO()([own["logprobs"] for own in pair], inputs).total + sum(each))
    assert all({"logprobs", "entropy"} == set(slopes) for slopes in value.slopes)


def test_a_plain_loss_in_the_form_of_outputs_is_itself():
    own = outputs()
    value, plain = of_outputs(PPO())([own], [INPUTS]), PPO()([own["logprobs"]], [INPUTS])
    assert (value.total, dict(value.metrics)) == (plain.total, dict(plain.metrics))
    assert np.array_equal(value.slopes[0]["logprobs"], plain.d_logprobs[0])
    summed = WeightedSum(Term(BradleyTerry(), "values"))
    assert of_outputs(summed) is summed


def test_sums_that_make_no_sense_are_refused():
    class Triple:
        name, group = "triple", 3

        def __call__(self, logprobs, loss_inputs, /):
            raise NotImplementedError

    with pytest.raises(ValueError, match="needs terms"):
        WeightedSum()
    with pytest.raises(ValueError, match="group size"):
        WeightedSum(Term(DPO()), Term(Triple()))
