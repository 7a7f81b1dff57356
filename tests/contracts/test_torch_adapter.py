"""The local torch executor keeps the contract of training clients, with all weights and with LoRA."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from crucible_kitchen.testing import contracts
from crucible_kitchen.types import LoraSpec, StateRef

pytest.importorskip("torch")
pytestmark = pytest.mark.anyio

LORA = {"all_weights": None, "lora": LoraSpec(4)}


def spoil(state: StateRef) -> None:
    """Flip one bit in the middle of the largest file of a state."""
    place = Path(state.uri.removeprefix("file://"))
    path = (
        max((p for p in place.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size) if place.is_dir() else place
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("check", contracts.TRAINING_CLIENT, ids=contracts.name)
async def test_training_client(check, kind, tmp_path):
    (entry,) = entry_points(group="crucible_kitchen.adapters", name="training_client.torch")
    client = entry.load()(threads=1)
    case = contracts.TrainingClientCase(
        client,
        "tiny",
        tmp_path,
        LORA[kind],
        tolerance=2e-4,
        learning_rate=0.2,
        unknown_model=str(tmp_path / "absent"),
        tamper=spoil,
    )
    await check(case)
    await client.aclose()
