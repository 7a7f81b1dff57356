"""What the client does by itself: states in between, requests put together."""

import threading

import anyio
import pytest

from crucible_kitchen.connections import Connections
from crucible_kitchen.errors import TransientBackendError
from crucible_kitchen.service.server import TrainingServer
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen_http import HttpSamplingClient, HttpTrainingClient
from crucible_kitchen_http.batches import _Request
from crucible_kitchen_http.endpoint import Endpoint
from crucible_kitchen_http.remote import RemoteModel
from crucible_kitchen_torch.decoding import Decoding
from crucible_kitchen_torch.tokenizers import ByteTokenizer

pytestmark = pytest.mark.anyio


async def test_calls_beyond_the_limit_are_replaced_by_a_state_and_the_weights_stay_the_same(
    server, undisturbed, run_training, tmp_path, monkeypatch
):
    client = HttpTrainingClient(base_url=server.url, api_key="a-key", recovery_bytes=1)
    remotes, kept = [], []

    def remembered(*arguments, **more):
        remotes.append(RemoteModel(*arguments, **more))
        return remotes[-1]

    async def note(_):
        kept.append(len(remotes[-1].kept))

    monkeypatch.setattr("crucible_kitchen_http.client.RemoteModel", remembered)
    losses, files = await run_training(client, tmp_path, between=note)
    await client.aclose()
    assert max(kept) <= 9, "calls of earlier steps are still kept"
    assert remotes[-1].start is not None
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


@pytest.mark.parametrize("extensions", [True, False])
async def test_samples_that_are_asked_for_at_once_are_decoded_together(extensions, server, tmp_path, monkeypatch):
    together = []
    advance = Decoding.advance

    def counted(decoding):
        together.append(len(decoding.jobs))
        return advance(decoding)

    monkeypatch.setattr(Decoding, "advance", counted)
    client = HttpTrainingClient(base_url=server.url, api_key="a-key", extensions=extensions, tokenizer=ByteTokenizer())
    async with client.open_session(SessionSpec("tiny", LoraSpec(4), 0, str(tmp_path))) as session:
        sampler = await session.sampler()
        async with anyio.create_task_group() as group:
            for seed in range(8):
                group.start_soon(sampler.sample, [49, 43], SamplingParams(max_tokens=48, seed=seed))
    await client.aclose()
    if extensions:
        assert together[0] == 8, "what came in one body is decoded from its first token on"
    assert max(together) > 1


async def test_an_answer_wakes_the_task_that_asked_and_no_other(client, tmp_path, monkeypatch):
    woken, exchanges = [], []
    wait, post = _Request.wait, Endpoint.post

    async def noted(request):
        await wait(request)
        woken.append(request)

    async def counted(endpoint, path, body, **more):
        exchanges.append(path)
        return await post(endpoint, path, body, **more)

    monkeypatch.setattr(_Request, "wait", noted)
    monkeypatch.setattr(Endpoint, "post", counted)
    monkeypatch.setattr("crucible_kitchen.service.departures._EXCHANGE", 0.0)
    async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
        sampler = await session.sampler()
        exchanges.clear()
        async with anyio.create_task_group() as group:
            for seed in range(24):
                params = SamplingParams(max_tokens=4 * seed + 1, seed=seed)
                group.start_soon(sampler.sample, [49, 43], params)
    assert exchanges.count("asample_batch") > 4
    assert len(woken) <= 24 + 2 * len(exchanges), "one task goes on with the exchanges; an answer is for one"


async def test_a_model_is_freed_although_the_first_word_of_it_is_lost(server, client, tmp_path, monkeypatch):
    lost = []
    request = Connections.request

    async def losing(connections, method, path, data):
        if path.endswith("unload_model") and not lost:
            lost.append(path)
            raise TransientBackendError("it is gone")
        return await request(connections, method, path, data)

    monkeypatch.setattr(Connections, "request", losing)
    models = set(server.core._models)
    async with client.open_session(SessionSpec("tiny", LoraSpec(4), 0, str(tmp_path))):
        assert set(server.core._models) > models
    assert lost
    assert set(server.core._models) == models


class Listening(TrainingServer):
    """Notes that somebody's client lives."""

    heard = threading.Event()

    def heartbeat(self, body):
        self.heard.set()
        return super().heartbeat(body)


async def test_the_server_is_told_that_a_sampler_of_saved_weights_is_still_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr("crucible_kitchen.testing.training_server.TrainingServer", Listening)
    monkeypatch.setattr("crucible_kitchen_http.endpoint._BEAT", 0.01)
    with RunningServer("toy", tmp_path / "listening", adapter="noop") as running:
        client = HttpSamplingClient(base_url=running.url)
        async with client.open_sampler("toy") as sampler:
            assert await anyio.to_thread.run_sync(Listening.heard.wait, 10)
            assert len(await sampler.sample([1], SamplingParams(max_tokens=1))) == 1
        with pytest.raises(ZeroDivisionError):
            async with client.open_sampler("toy"):
                raise ZeroDivisionError
        await client.aclose()
