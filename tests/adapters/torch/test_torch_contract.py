"""The torch executor keeps the contract of training clients with a model of transformers as well."""

from pathlib import Path
from urllib.parse import urlparse

import pytest

from crucible_kitchen.testing import contracts
from crucible_kitchen.types import LoraSpec, StateRef
from crucible_kitchen_torch import TorchTrainingClient

pytestmark = pytest.mark.anyio

KINDS = {"all_weights": None, "lora": LoraSpec(4)}


def spoil(state: StateRef) -> None:
    path = Path(urlparse(state.uri).path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", contracts.TRAINING_CLIENT, ids=contracts.name)
async def test_training_client(check, kind, llama, tmp_path):
    client = TorchTrainingClient(threads=1)
    await check(
        contracts.TrainingClientCase(
            client,
            str(llama),
            tmp_path,
            KINDS[kind],
            tolerance=1e-4,
            learning_rate=1e-2 if KINDS[kind] is None else 1e-1,
            unknown_model=str(tmp_path / "nowhere"),
            tamper=spoil,
        )
    )
