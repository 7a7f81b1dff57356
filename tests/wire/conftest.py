"""A run of training that is told over any client, and the servers it is told to."""

import hashlib
from pathlib import Path

import anyio
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("uvicorn")

from crucible_kitchen.testing.contracts.training_case import StatedCrossEntropy, batch
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import AdamParams, LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen_http import HttpTrainingClient
from crucible_kitchen_torch import TorchTrainingClient

STEPS = 8


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with RunningServer("tiny", tmp_path_factory.mktemp("server"), "a-key", threads=1) as running:
        yield running


@pytest.fixture
async def client(server):
    client = HttpTrainingClient(base_url=server.url, api_key="a-key")
    yield client
    await client.aclose()


async def train(client, directory, *, custom=True, between=None):
    """Train for some steps in every way there is; return losses and the hash of every exported file.

    ``between`` is called with the number of each step, in its middle.
    """
    losses = []
    spec = SessionSpec("tiny", LoraSpec(4), 7, str(directory / "states"))
    loss = StatedCrossEntropy() if custom else "cross_entropy"
    async with client.open_session(spec) as session:
        while session.position < STEPS:
            k = session.position
            datums = batch(session, 6)
            async with session.step(k) as step:
                pending = [await step.forward_backward(datums[:2])]
                if between is not None:
                    await between(k)
                pending.append(await step.forward_backward(datums[2:3], loss))
                pending.append(await step.forward_backward(datums[3:]))
                applied = await step.apply(AdamParams(3e-3, grad_clip_norm=1.0), scale=1 / (k + 2))
                losses += [(await each).loss for each in pending]
                losses.append((await applied).grad_norm)
            if k == 3:
                await (await session.save_state("four"))
        export = directory / "export"
        await anyio.Path(export).mkdir()
        exported = await session.export(str(export))
        files = {
            name: hashlib.sha256((Path(exported.directory) / name).read_bytes()).hexdigest() for name in exported.files
        }
    return np.asarray(losses), files


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """What the local executor makes of the run of built-in losses."""
    return anyio.run(lambda: train(TorchTrainingClient(threads=1), tmp_path_factory.mktemp("local"), custom=False))


@pytest.fixture(scope="session")
def undisturbed(server, tmp_path_factory):
    """What the whole run gives over a wire that nothing happens to."""

    async def run():
        client = HttpTrainingClient(base_url=server.url, api_key="a-key")
        found = await train(client, tmp_path_factory.mktemp("undisturbed"))
        await client.aclose()
        return found

    return anyio.run(run)


@pytest.fixture
def run_training():
    return train


@pytest.fixture
def greedy():
    return SamplingParams(max_tokens=4, temperature=0.0)
