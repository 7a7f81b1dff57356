"""The server without HTTP: which answers travel together, and what happens once a first model is there."""

import gc

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.cli.serving import _collect_less
from crucible_kitchen.service.futures import Futures
from crucible_kitchen.service.models import Limits
from crucible_kitchen.service.samplers import SamplingSession
from crucible_kitchen.service.server import TrainingServer
from crucible_kitchen_noop import NoopTrainingClient

pytestmark = pytest.mark.anyio


def drawn(session, number, took=1000.0):
    """Answer a request that is drawn."""
    future = session.numbered[number]
    future.resolve({"number": number})
    session.drawing -= 1
    session.answer(number, future, took)


async def test_an_answer_that_came_while_another_travelled_waits_for_others_too(monkeypatch):
    monkeypatch.setattr("crucible_kitchen.service.departures._EXCHANGE", 600.0)
    session, futures = SamplingSession("one", "toy"), Futures()
    for number in range(4):
        session.submit(number, futures, Limits())
    told = []

    async def ask():
        told.append(sorted(number for number, _ in await session.gathered(600.0)))

    with anyio.fail_after(10):
        drawn(session, 0, took=0.0)
        await ask()
        drawn(session, 1)  # on the way, while nobody asks
        session.receive([0], futures)
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert told == [[0]]
            drawn(session, 2)
            drawn(session, 3)
        assert told[1:] == [[1, 2, 3]], "nothing is drawn any more"
        await ask()
    assert told[2:] == [[1, 2, 3]], "a reply that was lost is given again, and at once"


async def test_a_question_that_came_twice_is_answered_twice():
    session, futures = SamplingSession("one", "toy"), Futures()
    session.submit(0, futures, Limits())
    told = []

    async def ask():
        told.append(sorted(number for number, _ in await session.gathered(600.0)))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(ask)
            await anyio.lowlevel.checkpoint()
            drawn(session, 0)
    assert told == [[0], [0]]


async def test_what_is_to_be_done_once_a_first_model_is_there_is_done_once(tmp_path):
    done = []
    core = TrainingServer(NoopTrainingClient(), "toy", tmp_path, loaded=lambda: done.append(True))
    with anyio.fail_after(10):
        async with core.open() as server:
            name = server.create_session({})["session_id"]
            assert not done
            for number in range(2):
                body = {"session_id": name, "model_seq_id": number, "base_model": "toy"}
                assert await server.futures.wait(server.create_model(body).id, 10.0)
    assert done == [True]


def test_what_a_server_loaded_is_left_out_of_collections_and_these_are_fewer():
    loaded = [[]]
    before = gc.get_threshold()
    try:
        _collect_less()
        assert gc.get_freeze_count() > 0
        assert all(each is not loaded for each in gc.get_objects())
        assert gc.get_threshold() == (50_000, *before[1:])
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
