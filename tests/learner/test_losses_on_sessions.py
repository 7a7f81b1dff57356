"""The losses on real sessions: they learn, and how a batch is split or ordered changes nothing."""

from itertools import chain

import numpy as np
import pytest

from crucible_kitchen.learner import DPO, GSPO, KTO, ORPO, PPO, SimPO, grpo, token_weights
from crucible_kitchen.types import AdamParams, Datum, SessionSpec
from crucible_kitchen_noop import NoopTrainingClient
from crucible_kitchen_torch import TorchTrainingClient

CLIENTS = {"noop": NoopTrainingClient, "torch": lambda: TorchTrainingClient(device="cpu", threads=1)}


@pytest.fixture(params=CLIENTS)
def opened(request, tmp_path):
    """A function that opens a session on the backend's smallest model."""
    client = CLIENTS[request.param]()
    return lambda: client.open_session(SessionSpec("tiny", None, 0, str(tmp_path)))


def answer(prompt, tokens, **inputs):
    """A datum of a prompt and an answer; inputs are one number or one per position."""
    plain = Datum.from_tokens([*prompt, *tokens], [0.0] * len(prompt) + [1.0] * len(tokens))
    arrays = {name: np.broadcast_to(np.float32(x), len(plain)) for name, x in inputs.items()}
    return Datum(plain.inputs, {**plain.loss_inputs, **arrays})


async def with_reference(session, datums, name):
    """The datums with the model's own log-probabilities as an input."""
    found = await (await session.forward(datums))
    return [Datum(d.inputs, {**d.loss_inputs, name: x}) for d, x in zip(datums, found.logprobs, strict=True)]


async def step(session, calls, loss, rate=3e-3):
    """One optimizer step over calls; the sum of their losses, their metrics, and the gradient's norm."""
    results = []
    async with session.step(session.position) as opened:
        pending = [await opened.forward_backward(call, loss) for call in calls]
        done = await opened.apply(AdamParams(rate), scale=1 / sum(len(call) for call in calls))
        results = [await p for p in pending]
        norm = (await done).grad_norm
    metrics = {k: sum(r.metrics[k] for r in results) for k in results[0].metrics}
    return sum(r.loss for r in results), metrics, norm


PROMPTS = [(5, 6, 7), (8, 9), (6, 5, 9, 8)]


def pairs():
    return [d for p in PROMPTS for d in (answer(p, (10, 11, 12)), answer(p, (13, 14)))]


@pytest.mark.anyio
@pytest.mark.parametrize("loss", [DPO(), SimPO(), ORPO()], ids=lambda loss: loss.name)
async def test_preference_training_prefers(opened, loss):
    async with opened() as session:
        datums = await with_reference(session, pairs(), "reference_logprobs")
        history = [await step(session, [datums], loss) for _ in range(12)]
    if loss.name == "sigmoid":
        assert history[0][0] == pytest.approx(3 * np.log(2), abs=1e-5)
    assert history[-1][0] < history[0][0]
    assert history[-1][1]["margin"] > history[0][1]["margin"]
    if loss.name == "sigmoid":
        assert history[-1][1]["accuracy"] == 3


@pytest.mark.anyio
async def test_kto_moves_wanted_and_unwanted_apart(opened):
    async with opened() as session:
        rows = [answer(p, t, desirable=w) for p in PROMPTS for t, w in (((10, 11), 1), ((13, 14), 0))]
        datums = await with_reference(session, rows, "reference_logprobs")
        history = [await step(session, [datums], KTO()) for _ in range(10)]
    last = history[-1][1]
    assert last["rows"] == 2 * last["desirable"] == 6
    assert last["chosen_reward"] > 0 > last["rejected_reward"]


@pytest.mark.anyio
@pytest.mark.parametrize("loss", [PPO(), GSPO()], ids=lambda loss: loss.name)
async def test_policy_training_makes_what_was_rewarded_likelier(opened, loss):
    advantages = grpo([1.0, 0.0])
    rollouts = [
        answer(p, t, advantages=a) for p in PROMPTS for t, a in zip(((10, 11), (13, 14)), advantages, strict=True)
    ]
    weighted = []
    for d in rollouts:
        w = token_weights(d.loss_inputs["weights"] > 0, "sequence_mean").weights
        weighted.append(Datum(d.inputs, {**d.loss_inputs, "weights": w.astype(np.float32)}))
    async with opened() as session:
        datums = await with_reference(session, weighted, "logprobs")
        first = await step(session, [datums], loss)
        second = await step(session, [datums], loss)
        after = (await (await session.forward(datums))).logprobs
    assert first[0] == pytest.approx(0, abs=1e-4)  # ratios of 1, advantages that cancel
    assert second[0] < first[0]
    for d, now in zip(datums, after, strict=True):
        gained = ((now - d.loss_inputs["logprobs"]) * d.loss_inputs["weights"]).sum()
        assert gained * d.loss_inputs["advantages"][0] > 0


@pytest.mark.anyio
async def test_the_order_and_the_split_of_pairs_change_nothing(opened):
    async def norm(arrange):
        async with opened() as session:
            datums = await with_reference(session, pairs(), "reference_logprobs")
            two = [datums[i : i + 2] for i in range(0, len(datums), 2)]
            return (await step(session, arrange(two), DPO()))[2]

    whole = await norm(lambda two: [[*chain(*two)]])
    assert await norm(lambda two: two) == pytest.approx(whole, rel=1e-5)
    assert await norm(lambda two: [[*chain(*two[::-1])]]) == pytest.approx(whole, rel=1e-5)
