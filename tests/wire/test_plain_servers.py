"""A server that knows the profile and no extensions: what it can do works, the rest is refused before a run.

The server is ours with the extensions switched off.
"""

import numpy as np
import pytest

from crucible_kitchen.errors import CapabilityError, WorkflowError
from crucible_kitchen.events import DpoStep, TrainingStep
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.service.server import TrainingServer
from crucible_kitchen.testing.contracts.training_case import StatedCrossEntropy, batch, look
from crucible_kitchen.testing.environments import installed
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import AdamParams, LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen.workflows.preference import preference
from crucible_kitchen.workflows.reinforcement import reinforcement
from crucible_kitchen.workflows.supervised import supervised
from crucible_kitchen_http import HttpTrainingClient
from crucible_kitchen_noop import NoopTrainingClient
from crucible_kitchen_noop.tokenizer import ByteTokenizer

pytestmark = pytest.mark.anyio

SPEC = SessionSpec("toy", LoraSpec(2), 3, "")
ADAM = AdamParams(0.3, eps=1.0, grad_clip_norm=0.5)


class PlainServer(TrainingServer):
    """Says nothing of extensions, as another server of the profile."""

    def create_session(self, body):
        return {key: value for key, value in super().create_session(body).items() if key != "crucible"}


def connected(server, **options):
    return HttpTrainingClient(base_url=server.url, tokenizer=ByteTokenizer(), extensions=False, **options)


@pytest.fixture
def plain(tmp_path, monkeypatch):
    monkeypatch.setattr("crucible_kitchen.testing.training_server.TrainingServer", PlainServer)
    with RunningServer("toy", tmp_path / "plain", adapter="noop") as running:
        yield running


async def steps(session, scales, loss="cross_entropy"):
    norms = []
    for scale in scales:
        async with session.step(session.position) as step:  # left: its gradient must not count
            await step.forward_backward(batch(session)[:1])
        async with session.step(session.position) as step:
            await step.forward_backward(batch(session), loss)
            norms.append((await (await step.apply(ADAM, scale=scale))).grad_norm)
    return norms, await look(session)


async def test_a_server_without_extensions_gets_a_constant_scale_folded_and_drops_nothing_by_itself(plain, tmp_path):
    client = connected(plain)
    local = SessionSpec("toy", LoraSpec(2), 3, str(tmp_path))
    for loss in ("cross_entropy", StatedCrossEntropy()):
        async with client.open_session(SPEC) as session, NoopTrainingClient().open_session(local) as twin:
            can = session.capabilities
            assert (can.step_scale, can.ordered_accumulation, can.export) == ("constant", False, False)
            session._info = twin.info  # the profile does not tell the size of a vocabulary
            norms, weights = await steps(session, [0.25] * 3, loss)
            expected, reference = await steps(twin, [0.25] * 3, loss)
            np.testing.assert_allclose(norms, expected, rtol=1e-5)
            for found, right in zip(weights, reference, strict=True):
                np.testing.assert_allclose(found, right, atol=1e-5)
            with pytest.raises(CapabilityError, match="one scale"):
                await steps(session, [0.5])
            with pytest.raises(CapabilityError):
                await session.export(str(tmp_path))
            with pytest.raises(CapabilityError):
                async with session.step(session.position) as step:
                    await step.forward_backward(batch(session), order=0)
    await client.aclose()


async def test_a_server_without_extensions_saves_loads_and_samples(plain):
    client = connected(plain)
    async with client.open_session(SPEC) as session:
        object.__setattr__(session._info, "vocab_size", 64)
        before = await look(session)
        state = await (await session.save_state("zero"))
        await steps(session, [0.5])
        await session.load_state(state)
        assert [a.tobytes() for a in await look(session)] == [b.tobytes() for b in before]
        await session.load_weights(state)
        assert session.position == 0
        _, after = await steps(session, [0.5])  # leaves a step: the model is made again, from the weights alone
        async with client.open_session(SPEC) as other:
            object.__setattr__(other._info, "vocab_size", 64)
            assert [a.tobytes() for a in after] == [b.tobytes() for b in (await steps(other, [0.5]))[1]]
        sampler = await session.sampler()
        (sample,) = await sampler.sample([1, 2], SamplingParams(max_tokens=3, temperature=1.0, seed=1))
        assert len(sample.tokens) >= 1
        (scores,) = await sampler.compute_logprobs([[1, 2, *sample.tokens.tolist()]])
        np.testing.assert_allclose(scores[1:], sample.logprobs, atol=1e-5)
        with pytest.raises(CapabilityError):
            await sampler.sample([1], SamplingParams(mode="deterministic"))
    with pytest.raises(CapabilityError, match="all weights"):
        async with client.open_session(SessionSpec("toy", None, 0, "")):
            pass
    await client.aclose()


UNEVEN = {
    "model": "toy",
    "dataset": "sums",
    "dataset_size": 14,
    "batch_size": 4,
    "eval_size": 2,
    "lora_rank": 2,
    "learning_rate": 0.01,
}
LETTERS = {
    "model": "toy",
    "lora_rank": 2,
    "env": "letters",
    "advantage": "grpo",
    "group_size": 2,
    "groups_per_batch": 2,
    "num_rollouts": 2,
    "max_tokens": 4,
    "eval_size": 2,
}
RUNS = {
    "supervised": (supervised, UNEVEN, TrainingStep),
    "preference": (preference, UNEVEN, DpoStep),
    "reinforcement": (reinforcement, LETTERS, TrainingStep),
}


async def events(home, client, name, **config):
    """Run a workflow without its export and return the losses of its steps."""
    workflow, values, kind = RUNS[name]
    workflow = workflow.without("save_final").without("register_model")
    adapters = {"training_client": client, "blob_store": "noop", "model_registry": "noop"}
    with installed():
        async with Kitchen(adapters, home=home) as kitchen:
            run = await kitchen.start(workflow, values | config)
            told = [record.event async for record in run.events()]
            await run.wait()
    return [event.loss for event in told if isinstance(event, kind)]


@pytest.mark.parametrize("name", RUNS)
async def test_a_whole_run_whose_batches_differ_in_size_has_the_losses_of_the_local_one(name, plain, home):
    client = connected(plain)
    far = await events(home, client, name)
    near = await events(home, NoopTrainingClient(), name)
    await client.aclose()
    assert len(far) == len(near) >= 2
    if name != "reinforcement":  # whose samples are drawn by whom they are drawn
        assert far == pytest.approx(near, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("supervised", {"lora_rank": 0}, "all weights"),
        ("supervised", {"lora_dropout": 0.1}, "lora_dropout"),
        ("supervised", {"chat_template": "{{ messages }}"}, "chat_template"),
        ("preference", {"lora_targets": ["q_proj"]}, "lora_targets"),
        ("reinforcement", {"learner": "streaming"}, "learner=batch"),
        ("reinforcement", {"sampling": "deterministic"}, "sampling=fast"),
        ("reinforcement", {"temperature": 0.7}, "temperature=1"),
        ("reinforcement", {"kl_coef": 0.1}, "reference"),
    ],
)
async def test_what_it_cannot_do_is_refused_before_anything_runs(name, config, says, home):
    client = HttpTrainingClient(base_url="http://127.0.0.1:9", extensions=False)  # nobody is asked
    with pytest.raises(WorkflowError) as caught:
        await events(home, client, name, **config)
    assert says in f"{caught.value} {caught.value.hint}"


async def test_a_run_that_would_export_is_refused_before_it_begins(home):
    client = HttpTrainingClient(base_url="http://127.0.0.1:9", extensions=False)
    with pytest.raises(WorkflowError, match="export"):
        async with Kitchen({"training_client": client}, home=home) as kitchen:
            await kitchen.start("supervised", UNEVEN)


async def test_a_server_that_lacks_the_extensions_is_found_out_before_the_first_step(plain):
    client = HttpTrainingClient(base_url=plain.url)
    with pytest.raises(CapabilityError) as caught:
        async with client.open_session(SPEC):
            pass
    await client.aclose()
    assert "extensions=false" in caught.value.hint
