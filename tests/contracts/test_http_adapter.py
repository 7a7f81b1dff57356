"""A training server and the client of it keep the contract that they stand between."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from crucible_kitchen.testing import contracts
from crucible_kitchen.types import LoraSpec

pytest.importorskip("torch")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.anyio

LORA = {"all_weights": None, "lora": LoraSpec(4)}


def adapter(name, server):
    (entry,) = entry_points(group="crucible_kitchen.adapters", name=name)
    return entry.load()(base_url=server.url, api_key="a-key")


def spoil(server, state):
    """Flip one bit in the middle of a saved state, as the server keeps it."""
    saved = server.core.index.get(state.uri)
    path = Path(saved.state.uri.removeprefix("file://"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def torch_server(tmp_path_factory):
    from crucible_kitchen.testing.training_server import RunningServer

    with RunningServer("tiny", tmp_path_factory.mktemp("server"), "a-key", threads=1) as server:
        yield server


@pytest.fixture
def threads_of_others():
    """The server's executor, which all tests share."""
    return ("torch",)


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("check", contracts.TRAINING_CLIENT, ids=contracts.name)
async def test_training_client(check, kind, torch_server, tmp_path):
    client = adapter("training_client.http", torch_server)
    case = contracts.TrainingClientCase(
        client,
        "tiny",
        tmp_path,
        LORA[kind],
        tolerance=2e-4,
        learning_rate=0.2,
        unknown_model="absent",
        tamper=lambda state: spoil(torch_server, state),
    )
    await check(case)
    await client.aclose()


@pytest.mark.parametrize("check", contracts.SAMPLING_CLIENT, ids=contracts.name)
async def test_sampling_client(check, torch_server):
    client = adapter("sampling_client.http", torch_server)
    await check(contracts.SamplingClientCase(client, "tiny", "absent", context_length=0))
    await client.aclose()
