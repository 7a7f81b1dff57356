"""The noop adapters keep every contract, on asyncio and on trio."""

from pathlib import Path

import pytest

from crucible_kitchen.ports import PORTS, DatasetSpec
from crucible_kitchen.testing import contracts
from crucible_kitchen.types import BlobRef, LoraSpec, StateRef
from crucible_kitchen_noop import (
    NoopBlobStore,
    NoopDatasetStore,
    NoopEvaluator,
    NoopLLMClient,
    NoopModelRegistry,
    NoopSamplingClient,
    NoopTrainingClient,
)

pytestmark = pytest.mark.anyio

TRAINING = {
    "all_weights": (None, {}),
    "lora": (LoraSpec(4), {}),
    "constant_scale": (None, {"step_scale": "constant"}),
    "no_scale": (None, {"step_scale": "none", "custom_loss": "refused", "sampling": False, "export": False}),
    "step_token": (None, {"recovery": "step_token"}),
}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


def spoil(state: StateRef) -> None:
    path = Path(state.uri)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("check", contracts.TRAINING_CLIENT, ids=contracts.name)
async def test_training_client(check, kind, tmp_path):
    lora, capabilities = TRAINING[kind]
    client = NoopTrainingClient(models=["toy"], capabilities=capabilities)
    await check(
        contracts.TrainingClientCase(
            client, "toy", tmp_path, lora, learning_rate=5.0, unknown_model="other", tamper=spoil
        )
    )


@pytest.mark.parametrize("check", contracts.SAMPLING_CLIENT, ids=contracts.name)
async def test_sampling_client(check):
    client = NoopSamplingClient(models=["toy"])
    await check(contracts.SamplingClientCase(client, "toy", "other", tolerance=1e-6, context_length=8192))


@pytest.mark.parametrize("check", contracts.DATASET_STORE, ids=contracts.name)
async def test_dataset_store(check):
    await check(
        contracts.DatasetStoreCase(
            NoopDatasetStore(names=["toy"]),
            DatasetSpec("toy"),
            other_split="test",
            missing=DatasetSpec("other"),
            empty=DatasetSpec("toy", options=(("rows", "0"),)),
            changed=DatasetSpec("toy", seed=1),
        )
    )


@pytest.mark.parametrize("check", contracts.EVALUATOR, ids=contracts.name)
async def test_evaluator(check):
    await check(contracts.EvaluatorCase(NoopEvaluator()))


@pytest.mark.parametrize("check", contracts.MODEL_REGISTRY, ids=contracts.name)
async def test_model_registry(check):
    await check(contracts.ModelRegistryCase(NoopModelRegistry()))


@pytest.mark.parametrize("check", contracts.BLOB_STORE, ids=contracts.name)
async def test_blob_store(check, tmp_path):
    store = NoopBlobStore()

    def tamper(ref: BlobRef) -> None:
        store._blobs[ref.sha256] += b"!"

    await check(contracts.BlobStoreCase(store, tmp_path, tamper))


@pytest.mark.parametrize("check", contracts.LLM_CLIENT, ids=contracts.name)
async def test_llm_client(check):
    await check(contracts.LLMClientCase(NoopLLMClient()))


@pytest.mark.parametrize(
    ("port", "adapter"),
    [
        ("training_client", NoopTrainingClient),
        ("sampling_client", NoopSamplingClient),
        ("dataset_store", NoopDatasetStore),
        ("evaluator", NoopEvaluator),
        ("model_registry", NoopModelRegistry),
        ("blob_store", NoopBlobStore),
        ("llm_client", NoopLLMClient),
    ],
)
def test_every_port_has_a_noop_adapter_that_says_it_is_synthetic(port, adapter):
    built = adapter()
    assert isinstance(built, PORTS[port].protocol)
    assert built.synthetic
