"""Requests that share exchanges: who is cancelled, refused or out of luck takes nobody along.

Against real servers where it can be, and with a network by hand where a certain moment is meant.
"""

import random
import threading

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.errors import BackendUserError, SessionLost
from crucible_kitchen.service.futures import Futures
from crucible_kitchen.service.models import Limits
from crucible_kitchen.service.samplers import SamplingSession, reply
from crucible_kitchen.testing.proxy import FaultyProxy
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import SamplingParams, SessionSpec
from crucible_kitchen.wire.codec import loads
from crucible_kitchen.workers import run_sync
from crucible_kitchen_http import HttpTrainingClient, endpoint
from crucible_kitchen_http.batches import Batches
from crucible_kitchen_http.endpoint import Endpoint
from crucible_kitchen_torch.decoding import Decoding

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
                assert not any((sampler._batches._new, sampler._batches._left, sampler._batches._sent))
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


@pytest.mark.parametrize("late", [0, 10], ids=["in one turn", "while another waits"])
async def test_a_request_that_is_refused_fails_alone(late, tmp_path):
    with RunningServer("tiny", tmp_path / "home", limits=Limits(body=4000), threads=1) as running:
        client = HttpTrainingClient(base_url=running.url)
        async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
            sampler = await session.sampler()
            drawn = []

            async def draw(size):
                drawn.append(len((await sampler.sample([7] * size, SamplingParams(max_tokens=20, seed=0)))[0].tokens))

            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    for size in (1, 300, 300, 300, 300, 300):  # together they are larger than the server takes
                        group.start_soon(draw, size)
                    await turns(late)
                    with pytest.raises(BackendUserError, match="larger than 4000 bytes"):
                        await sampler.sample([7] * 2000, SamplingParams(max_tokens=1))
        await client.aclose()
    assert len(drawn) == 6


async def test_a_question_that_waits_does_not_hold_up_the_servers_end(tmp_path, monkeypatch):
    begun, told = threading.Event(), threading.Event()

    def endless(_):
        begun.set()
        told.wait(30)
        return []

    async def draw(sampler):
        with pytest.raises(SessionLost, match="the server has ended"):
            await sampler.sample([7], SamplingParams(max_tokens=2))
        told.set()

    monkeypatch.setattr(Decoding, "advance", endless)
    with anyio.fail_after(20), RunningServer("tiny", tmp_path / "home", threads=1) as running:
        client = HttpTrainingClient(base_url=running.url, patience=60.0)
        async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
            sampler = await session.sampler()
            async with anyio.create_task_group() as group:
                group.start_soon(draw, sampler)
                await run_sync(begun.wait, 20)
                running._serving.should_exit = True
        await client.aclose()
    assert told.is_set()


class ByHand:
    """A server's sampling session where the test draws, and a network where it says when replies arrive."""

    def __init__(self, room=256):
        self.session, self.futures, self.limits = SamplingSession("s", "toy"), Futures(), Limits(open_calls=room // 16)
        self.bodies, self.replies = [], []
        self.holds = []

    def hold(self, asks):
        """Keep back the next reply to a question, or to a mere submission, until the event that is returned."""
        self.holds.append((asks, arrived := anyio.Event()))
        return arrived

    def take(self, body):
        self.session.receive(body.get("received", ()), self.futures)
        return self.session.submit_all([each["seq_id"] for each in body["requests"]], self.futures, self.limits)[1]

    def drawn(self, *numbers):
        for number in numbers:
            future = self.session.numbered[number]
            future.resolve({"n": number})
            self.session.drawing -= 1
            self.session.answer(number, future, 0.0)

    async def post(self, _, data):
        body = loads(data)
        asks = "wait" in body
        held = next((hold for hold in self.holds if hold[0] == asks), None)
        if held:
            self.holds.remove(held)
        self.bodies.append(body)
        left = self.take(body)
        told = loads(reply(await self.session.gathered(1.0) if asks else [], left))
        if held:
            await held[1].wait()
        return told


@pytest.fixture
async def by_hand():
    """Ask for numbers over a network by hand: the network, what was found, and how to ask."""
    network, found = ByHand(room=16), {}
    batches = Batches(network, "s")
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:

            async def one(number, scope):
                with scope:
                    found[number] = (await batches.ask(number, {}))["n"]

            async def ask(*numbers):
                scopes = [anyio.CancelScope() for _ in numbers]
                for number, scope in zip(numbers, scopes, strict=True):
                    group.start_soon(one, number, scope)
                await turns(10)
                return scopes

            yield network, batches, found, ask


async def test_an_answer_is_taken_also_for_a_request_that_is_about_to_be_sent_again(by_hand):
    network, _, found, ask = by_hand
    told = network.hold(asks=True)
    network.hold(asks=False)  # for good
    await ask(0)
    submitter, _ = await ask(1, 2)
    network.drawn(2)  # told in the reply to the question, which is on its way
    await turns(10)
    submitter.cancel()
    told.set()
    await turns(20)
    network.drawn(0)
    await turns(20)
    assert found == {0: 0, 2: 2}


async def test_an_answer_is_taken_also_for_a_request_that_there_was_no_room_for(by_hand):
    network, batches, found, ask = by_hand
    await ask(*range(16))
    slow = network.hold(asks=False)
    await ask(16)
    submission = network.bodies[-1]
    network.drawn(0)
    await turns(20)  # the next question says that 0 was received
    slow.set()
    await turns(5)
    assert list(batches._left) == [16]
    assert not network.take(submission), "a copy of it arrives late, and there is room"
    network.drawn(16)
    await turns(20)
    assert found == {0: 0, 16: 16}
    network.drawn(*range(1, 16))
    await turns(20)
    assert len(found) == 17


async def test_only_as_much_of_what_was_left_is_sent_again_as_room_was_made(by_hand):
    network, _, found, ask = by_hand
    await ask(*range(60))
    for number in range(60):
        network.drawn(number)
        await turns(20)
    assert len(found) == 60
    assert sum(len(body["requests"]) for body in network.bodies) <= 60 + 44 + 60


async def test_what_was_left_goes_before_what_came_later(by_hand):
    network, _, found, ask = by_hand
    await ask(*range(16))
    await ask(16, 17, 18)
    await ask(19, 20)
    for number in range(21):
        network.drawn(number)
        await turns(20)
    assert len(found) == 21
    assert list(network.session.numbered) == list(range(21)), "in this order the server took them"


async def test_somebody_asks_on_while_a_submission_is_slow(by_hand):
    network, _, found, ask = by_hand
    network.hold(asks=False)  # for good
    await ask(0)
    submitter, _ = await ask(1, 2)
    network.drawn(0)  # who asked has its answer, and leaves
    await turns(20)
    network.drawn(2)
    await turns(20)
    assert found == {0: 0, 2: 2}
    submitter.cancel()
    await turns(10)


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
