"""Policies over observations: they act by the caller's random numbers, learn by the same losses, and are snapshots."""

import json

import numpy as np
import pytest
import torch

from crucible_kitchen.errors import BackendUserError, CapabilityError, SessionLost
from crucible_kitchen.learner.terms import Term, WeightedSum
from crucible_kitchen.types import AdamParams, Datum, LossValue, MlpSpec, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient

pytestmark = pytest.mark.anyio
SHAPE = MlpSpec(observation_size=4, actions=3, hidden=(16, 16))


@pytest.fixture
def anyio_backend():
    return "asyncio"


def spec(tmp_path, *, value_head=True, seed=1):
    return SessionSpec("mlp", None, seed, str(tmp_path), value_head=value_head, mlp=SHAPE)


def observed(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


def episode(rows, seed=0):
    draw = np.random.default_rng(seed + 1)
    weights = np.ones(rows, np.float32)
    inputs = {"target_tokens": draw.integers(0, 3, rows), "weights": weights}
    return Datum({"observations": observed(rows, seed)}, inputs)


class Squares:
    """Half the squared distance of values from 1."""

    name, group = "squares", 1

    def __call__(self, values, loss_inputs, /):
        off = np.asarray(values[0]) - 1.0
        return LossValue(float(off @ off) / 2, [off], {})


async def test_equal_random_numbers_give_equal_actions_by_the_cumulative_rule(tmp_path):
    async with TorchTrainingClient().open_session(spec(tmp_path)) as session:
        policy = await session.policy()
        seen, uniforms = observed(200), np.random.default_rng(5).random(200)
        one, two = await policy.act(seen, uniforms), await policy.act(seen, uniforms)
        datums = [Datum({"observations": seen}, {"target_tokens": one.actions})]
        every = np.asarray((await (await session.forward(datums, outputs=("logits",)))).outputs["logits"][0])
    assert np.array_equal(one.actions, two.actions)
    p = torch.softmax(torch.from_numpy(every).double(), -1).numpy()
    assert np.array_equal(one.actions, (p.cumsum(-1) <= uniforms[:, None]).sum(-1))
    assert np.allclose(one.logprobs, np.log(p[np.arange(200), one.actions]), atol=1e-6)
    assert len(set(one.actions.tolist())) == 3


async def test_without_random_numbers_it_takes_the_likeliest_action(tmp_path):
    async with TorchTrainingClient().open_session(spec(tmp_path)) as session:
        seen = observed(20)
        acted = await (await session.policy()).act(seen)
        datums = [Datum({"observations": seen}, {})]
        every = np.asarray((await (await session.forward(datums, outputs=("logits",)))).outputs["logits"][0])
    assert np.array_equal(acted.actions, every.argmax(-1))


async def test_what_was_sampled_is_what_training_computes(tmp_path):
    async with TorchTrainingClient().open_session(spec(tmp_path)) as session:
        seen = observed(50)
        policy = await session.policy()
        acted, values = await policy.act(seen, np.random.default_rng(0).random(50)), await policy.values(seen)
        datum = Datum({"observations": seen}, {"target_tokens": acted.actions})
        result = await (await session.forward([datum], outputs=("logprobs", "values")))
    assert np.abs(result.logprobs[0] - acted.logprobs).max() < 1e-6
    assert np.abs(result.outputs["values"][0] - values).max() < 1e-6


async def test_policy_and_value_network_learn_together_and_a_policy_is_a_snapshot(tmp_path):
    async with TorchTrainingClient().open_session(spec(tmp_path)) as session:
        before = await session.policy()
        seen = observed(10)
        first, values = await before.act(seen), await before.values(seen)
        losses = []
        for index in range(20):
            async with session.step(index) as step:
                terms = WeightedSum(Term(Squares(), "values"))
                result = await step.forward_backward([episode(30)], terms)
                await step.forward_backward([episode(30)], "cross_entropy")
                await (await step.apply(AdamParams(0.01)))
                losses.append((await result).loss)
        after = await session.policy()
        assert (before.version, after.version) == (0, 20)
        again = await before.act(seen)
        assert np.array_equal(again.logprobs, first.logprobs)
        assert np.array_equal(await before.values(seen), values)
        assert not np.array_equal((await after.act(seen)).logprobs, first.logprobs)
    assert losses[-1] < losses[0] / 10


async def test_a_state_holds_both_networks_bit_for_bit(tmp_path):
    client = TorchTrainingClient()
    async with client.open_session(spec(tmp_path)) as session:
        async with session.step(0) as step:
            await step.forward_backward([episode(30)], WeightedSum(Term(Squares(), "values")))
            await step.forward_backward([episode(30)])
            await (await step.apply(AdamParams(0.01)))
        state = await (await session.save_state("one"))
        policy = await session.policy()
        expected = (await policy.act(observed(8))).logprobs, await policy.values(observed(8))
    async with client.open_session(spec(tmp_path, seed=9)) as other:
        await other.load_state(state)
        policy = await other.policy()
        found = (await policy.act(observed(8))).logprobs, await policy.values(observed(8))
    assert np.array_equal(found, expected)


async def test_an_export_tells_the_shape_and_holds_the_value_head(tmp_path):
    directory = tmp_path / "export"
    directory.mkdir()
    async with TorchTrainingClient().open_session(spec(tmp_path)) as session:
        exported = await session.export(str(directory))
    assert exported.format == "mlp"
    assert set(exported.files) == {"config.json", "model.safetensors", "value_head.safetensors"}
    assert json.loads((directory / "config.json").read_text())["observation_size"] == 4


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((3, 5), np.float32), r"\[G, 4\]"),
        (np.zeros(4, np.float32), r"\[G, 4\]"),
        (np.zeros((0, 4), np.float32), r"\[G, 4\]"),
        (np.full((2, 4), np.nan, np.float32), "not finite"),
    ],
)
async def test_observations_of_another_kind_are_refused_and_the_session_stays_usable(tmp_path, bad, says):
    async with TorchTrainingClient().open_session(spec(tmp_path)) as session:
        policy = await session.policy()
        with pytest.raises(BackendUserError, match=says):
            await policy.act(bad)
        assert (await policy.act(observed(2))).actions.shape == (2,)


async def test_what_does_not_fit_observations_is_refused(tmp_path):
    client = TorchTrainingClient()
    async with client.open_session(spec(tmp_path, value_head=False)) as session:
        policy = await session.policy()
        with pytest.raises(CapabilityError, match="no value head"):
            await policy.values(observed(2))
        with pytest.raises(CapabilityError, match="observations, not tokens"):
            await session.sampler()
        with pytest.raises(CapabilityError, match="observations, not tokens"):
            _ = session.tokenizer
        await policy.aclose()
        with pytest.raises(SessionLost):
            await policy.act(observed(2))
    for wrong in (SessionSpec("mlp", None, 1, str(tmp_path)), SessionSpec("tiny", None, 1, str(tmp_path), mlp=SHAPE)):
        with pytest.raises(CapabilityError, match="sizes of observations"):
            async with client.open_session(wrong):
                pass
