"""Requests that share exchanges: who is cancelled, refused or out of luck takes nobody along."""

import random

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.errors import BackendUserError
from crucible_kitchen.service.models import Limits
from crucible_kitchen.testing.proxy import FaultyProxy
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import SamplingParams, SessionSpec
from crucible_kitchen_http import HttpTrainingClient, endpoint
from crucible_kitchen_http.endpoint import Endpoint

pytestmark = pytest.mark.anyio

SEEDS = range(20)


async def tokens(sampler, number):
    params = SamplingParams(max_tokens=1 + 5 * (number % 7), seed=number)
    return (await sampler.sample([49, 43, 50 + number % 3], params))[0].tokens.tolist()


async def turns(count):
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A server that draws 16 samples at once and leaves others to be asked for again."""
    with RunningServer("tiny", tmp_path_factory.mktemp("narrow"), limits=Limits(open_calls=1), threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def expected(narrow, tmp_path_factory):
    """Every sample of these tests, asked for alone."""

    async def ask():
        client = HttpTrainingClient(base_url=narrow.url)
        spec = SessionSpec("tiny", None, 0, str(tmp_path_factory.mktemp("alone")))
        async with client.open_session(spec) as session:
            sampler = await session.sampler()
            found = [await tokens(sampler, number) for number in range(21)]
        await client.aclose()
        return found

    return anyio.run(ask)


@pytest.mark.parametrize("seed", SEEDS)
async def test_who_is_not_cancelled_gets_its_own_samples_whatever_happens_to_others_and_on_the_way(
    seed, narrow, expected, tmp_path
):
    chance = random.Random(seed)
    found, wanted = {}, {}

    async def agent(sampler, name, numbers, scope, start):
        await turns(start)
        with scope:
            for turn, number in enumerate(numbers):
                found[name, turn] = await tokens(sampler, number)

    async def cancel(scope, late):
        await turns(late)
        scope.cancel()

    with anyio.fail_after(120):
        async with FaultyProxy(int(narrow.url.rpartition(":")[2]), 0.1, seed).open() as proxy:
            client = HttpTrainingClient(base_url=proxy.url, timeout=5.0)
            async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
                sampler = await session.sampler()
                async with anyio.create_task_group() as group:
                    for name in range(24):
                        scope = anyio.CancelScope()
                        numbers = [chance.randrange(21) for _ in range(chance.randrange(1, 4))]
                        group.start_soon(agent, sampler, name, numbers, scope, chance.randrange(200))
                        if chance.random() < 0.3:
                            group.start_soon(cancel, scope, chance.randrange(400))
                        else:
                            wanted |= {(name, turn): expected[number] for turn, number in enumerate(numbers)}
                proxy.let_pass()
                assert not sampler._batches._new
                assert not sampler._batches._sent
            await client.aclose()
    assert {key: found.get(key) for key in wanted} == wanted


async def test_a_client_may_want_more_samples_at_once_than_the_server_draws(narrow, tmp_path, monkeypatch):
    refused, most, found = [], [], []
    refusal = endpoint._refusal

    def noted(response):
        refused.append(response.status_code)
        return refusal(response)

    async def draw(sampler, number):
        found.append(await tokens(sampler, number))
        drawn = narrow.core._sampling[sampler._name]
        most.append(drawn.drawing + len(drawn.answers))

    monkeypatch.setattr(endpoint, "_refusal", noted)
    client = HttpTrainingClient(base_url=narrow.url)
    async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
        sampler = await session.sampler()
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(60):
                    group.start_soon(draw, sampler, number)
    await client.aclose()
    assert len(found) == 60
    assert max(most) <= 16
    assert not refused, "who asks for answers comes again"


async def test_a_request_that_is_refused_fails_alone(tmp_path):
    with RunningServer("tiny", tmp_path / "home", limits=Limits(body=4000), threads=1) as running:
        client = HttpTrainingClient(base_url=running.url)
        async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
            sampler = await session.sampler()
            drawn = []

            async def draw():
                drawn.append(len((await sampler.sample([7], SamplingParams(max_tokens=200, seed=0)))[0].tokens))

            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    group.start_soon(draw)
                    await turns(10)
                    with pytest.raises(BackendUserError, match="larger than 4000 bytes"):
                        await sampler.sample([7] * 2000, SamplingParams(max_tokens=1))
        await client.aclose()
    assert len(drawn) == 1


async def test_what_is_asked_while_another_waits_is_submitted_at_once(client, tmp_path, monkeypatch):
    bodies = []
    post = Endpoint.post

    async def noted(endpoint, path, body, **more):
        bodies.append(body)
        return await post(endpoint, path, body, **more)

    async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
        sampler = await session.sampler()
        monkeypatch.setattr(Endpoint, "post", noted)
        async with anyio.create_task_group() as group:
            group.start_soon(tokens, sampler, 6)
            with anyio.fail_after(30):
                while not bodies:
                    await anyio.lowlevel.checkpoint()
                assert b'"wait"' in bodies[0]
                assert b'"seq_id":0' in bodies[0], "a question takes along what is new"
                group.start_soon(tokens, sampler, 5)
                await turns(5)
                assert b'"wait"' not in bodies[1], "somebody waits already"
                assert b'"seq_id":1' in bodies[1]
