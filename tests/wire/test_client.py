"""What the client does by itself: states in between, requests put together, servers that know no extensions."""

import anyio
import numpy as np
import pytest

from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.service.server import TrainingServer
from crucible_kitchen.testing.contracts.training_case import StatedCrossEntropy, batch, look
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import AdamParams, LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen_http import HttpTrainingClient
from crucible_kitchen_http.remote import RemoteModel
from crucible_kitchen_noop import NoopTrainingClient
from crucible_kitchen_noop.tokenizer import ByteTokenizer

pytestmark = pytest.mark.anyio

SPEC = SessionSpec("toy", LoraSpec(2), 3, "")
ADAM = AdamParams(0.3, eps=1.0, grad_clip_norm=0.5)


async def test_calls_beyond_the_limit_are_replaced_by_a_state_and_the_weights_stay_the_same(
    server, undisturbed, run_training, tmp_path, monkeypatch
):
    client = HttpTrainingClient(base_url=server.url, api_key="a-key", recovery_bytes=1)
    remotes, kept = [], []

    def remembered(*arguments):
        remotes.append(RemoteModel(*arguments))
        return remotes[-1]

    async def note(_):
        kept.append(len(remotes[-1].kept))

    monkeypatch.setattr("crucible_kitchen_http.client.RemoteModel", remembered)
    losses, files = await run_training(client, tmp_path, between=note)
    await client.aclose()
    assert max(kept) <= 9, "calls of earlier steps are still kept"
    assert remotes[-1].state is not None
    assert abs(losses - undisturbed[0]).max() <= 1e-6
    assert files == undisturbed[1]


async def test_who_waits_goes_on_when_the_one_that_asked_for_all_is_cancelled(client, tmp_path):
    async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
        sampler = await session.sampler()
        found = {}

        async def ask(number, scope):
            with scope:
                params = SamplingParams(max_tokens=8, seed=number)
                found[number] = (await sampler.sample([49, 43], params))[0].tokens.tolist()

        scopes = [anyio.CancelScope() for _ in range(6)]
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                for number, scope in enumerate(scopes):
                    group.start_soon(ask, number, scope)
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
                scopes[0].cancel()
                scopes[3].cancel()
        assert set(found) >= {1, 2, 4, 5}
        again = await sampler.sample([49, 43], SamplingParams(max_tokens=8, seed=4))
        assert again[0].tokens.tolist() == found[4]


class PlainServer(TrainingServer):
    """Says nothing of extensions, as another server of the profile."""

    def create_session(self, body):
        return {key: value for key, value in super().create_session(body).items() if key != "crucible"}


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
    client = HttpTrainingClient(base_url=plain.url, tokenizer=ByteTokenizer())
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
    client = HttpTrainingClient(base_url=plain.url, tokenizer=ByteTokenizer())
    async with client.open_session(SPEC) as session:
        object.__setattr__(session._info, "vocab_size", 64)
        before = await look(session)
        state = await (await session.save_state("zero"))
        await steps(session, [0.5])
        await session.load_state(state)
        assert [a.tobytes() for a in await look(session)] == [b.tobytes() for b in before]
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
