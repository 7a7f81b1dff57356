"""A server that is killed in the middle of a run and started again: the run goes on, and ends with the same bits."""

import json
import os
import signal
import subprocess
import sys

import anyio
import pytest

from crucible_kitchen.errors import SessionLost
from crucible_kitchen.service.run import bind
from crucible_kitchen.testing.contracts.training_case import batch, look
from crucible_kitchen.testing.proxy import FaultyProxy
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import AdamParams, LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen.wire.codec import dumps
from crucible_kitchen_http import HttpTrainingClient
from crucible_kitchen_http.endpoint import Endpoint, EndpointOptions

pytestmark = pytest.mark.anyio


class Process:
    """A training server in a process of its own, on one port and home for all its lives."""

    def __init__(self, home):
        self.home = home
        with bind("127.0.0.1", 0) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.lives = 0
        self.start()

    def start(self):
        self.lives += 1
        command = [sys.executable, "-m", "crucible_kitchen", "train-server", "--model", "tiny", "--json"]
        command += ["--port", str(self.port), "--home", str(self.home), "--adapter", "training_client=torch,threads=1"]
        environment = os.environ | {"CRUCIBLE_API_KEY": "a-key"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        assert json.loads(self.process.stdout.readline())["url"] == self.url

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def process(tmp_path):
    process = Process(tmp_path / "home")
    yield process
    process.kill()


@pytest.fixture
async def client(process):
    client = HttpTrainingClient(base_url=process.url, api_key="a-key", timeout=40.0)
    yield client
    await client.aclose()


async def test_a_run_whose_server_is_killed_ends_with_the_bits_of_the_undisturbed_one(
    process, client, undisturbed, run_training, tmp_path
):
    async def kill(k):
        if k in (2, 6):  # before the first saved state and after it, with a gradient under way
            process.kill()
            await anyio.to_thread.run_sync(process.start)

    losses, files = await run_training(client, tmp_path, between=kill)
    assert process.lives == 3
    assert abs(losses - undisturbed[0]).max() <= 1e-6
    assert files == undisturbed[1], "the exported weights differ in a bit"


async def test_after_a_restart_saved_weights_are_found_and_unfinished_futures_are_lost(process, client, tmp_path):
    endpoint = Endpoint(EndpointOptions(process.url, client._options.api_key))
    spec = SessionSpec("tiny", LoraSpec(4), 1, str(tmp_path))
    async with client.open_session(spec) as session:
        before = await look(session)
        state = await (await session.save_state("kept"))
        sampler = await session.sampler()
        slow = {"num_samples": 64, "prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 400}}
        asked = {"sampling_session_id": sampler._name, "seq_id": 0, "type": "sample"}
        taken = await endpoint.post("asample", dumps(slow | asked))
        process.kill()
        await anyio.to_thread.run_sync(process.start)
        with anyio.fail_after(20), pytest.raises(SessionLost):
            await endpoint.result(taken["request_id"])
        with pytest.raises(SessionLost, match="sampl"):
            await sampler.sample([1, 2], SamplingParams(max_tokens=1))
        assert [a.tobytes() for a in await look(session)] == [b.tobytes() for b in before], "the model was made again"
    async with client.open_session(spec) as other:
        async with other.step(0) as step:
            await step.forward_backward(batch(other))
            await (await step.apply(AdamParams(1e-2)))
        await other.load_state(state)
        assert [a.tobytes() for a in await look(other)] == [b.tobytes() for b in before], (
            "saved weights are found again"
        )
    await endpoint.aclose()


class RestartingProxy(FaultyProxy):
    """Starts another server in the place of the one there, just before or after it gets the n-th message."""

    def __init__(self, restart, at):
        super().__init__(0, 0.0, 0)
        self._restart = restart
        self._at = at
        self._count = 0

    async def _exchanged(self, request, fault):
        self._count += 1
        now = self._count == self._at
        if now and self._at % 2:
            await self._restart()
        reply = await super()._exchanged(request, fault)
        if now and not self._at % 2:
            await self._restart()
            return None
        return reply


MESSAGES = range(6, 91, 3)
QUICK = (9, 40, 63)


@pytest.mark.parametrize(
    "at", [n if n in QUICK else pytest.param(n, marks=pytest.mark.e2e) for n in sorted({*MESSAGES, *QUICK})]
)
async def test_a_restart_at_any_message_changes_nothing(at, undisturbed, run_training, tmp_path):
    running = []

    def start():
        server = RunningServer("tiny", tmp_path / "home", "a-key", threads=1).__enter__()
        running.append(server)
        return int(server.url.rpartition(":")[2])

    async def restart():
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(running[-1].__exit__)
            proxy.point_to(await anyio.to_thread.run_sync(start))

    proxy = RestartingProxy(restart, at)
    proxy.point_to(start())
    try:
        async with proxy.open():
            client = HttpTrainingClient(base_url=proxy.url, api_key="a-key", timeout=40.0)
            losses, files = await run_training(client, tmp_path)
            await client.aclose()
    finally:
        running[-1].__exit__()
    assert len(running) == 2
    assert abs(losses - undisturbed[0]).max() <= 1e-6
    assert files == undisturbed[1], "the exported weights differ in a bit"
