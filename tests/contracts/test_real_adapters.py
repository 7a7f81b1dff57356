"""The adapters that keep files, count for real, or remember: the same contracts as everybody."""

import json
from importlib.metadata import entry_points

import pytest

from crucible_kitchen.ports import DatasetSpec
from crucible_kitchen.testing import contracts

pytestmark = pytest.mark.anyio

SECRET_ROW = "the canary of a row"


def adapter(name, **options):
    (entry,) = entry_points(group="crucible_kitchen.adapters", name=name)
    return entry.load()(**options)


@pytest.fixture
def rows(tmp_path):
    """Files of rows: whole ones, others, none, and one with a line that cannot be read."""
    lines = [json.dumps({"prompt": f"question {i}", "completion": f"answer {i}"}) for i in range(60)]
    contents = {
        "good": lines,
        "changed": [line.replace("answer", "reply") for line in lines],
        "empty": [],
        "broken": [*lines[:30], '{"prompt": "' + SECRET_ROW, *lines[30:]],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in content))
    return tmp_path


def spec(rows, name):
    return DatasetSpec(str(rows / f"{name}.jsonl"), holdout=0.2)


@pytest.mark.parametrize("check", contracts.DATASET_STORE, ids=contracts.name)
async def test_files_as_a_dataset_store(check, rows):
    store = adapter("dataset_store.files")
    case = contracts.DatasetStoreCase(
        store,
        spec(rows, "good"),
        other_split="test",
        missing=DatasetSpec(str(rows / "absent.jsonl")),
        empty=spec(rows, "empty"),
        changed=spec(rows, "changed"),
        broken=(spec(rows, "broken"), SECRET_ROW),
    )
    await check(case)
    await store.aclose()


@pytest.mark.parametrize("check", contracts.DATASET_STORE, ids=contracts.name)
async def test_a_built_in_task_as_a_dataset(check):
    store = adapter("dataset_store.files")
    case = contracts.DatasetStoreCase(
        store, DatasetSpec("sums", limit=200), other_split="test", changed=DatasetSpec("sums", limit=200, seed=1)
    )
    await check(case)
    await store.aclose()


@pytest.mark.parametrize("check", contracts.DATASET_STORE, ids=contracts.name)
async def test_hugging_face_as_a_dataset_store(check, tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("good", "changed"):
        rows = [{"prompt": f"question {i}", "completion": f"{name} answer {i}"} for i in range(60)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    store = adapter("dataset_store.huggingface")
    case = contracts.DatasetStoreCase(
        store,
        DatasetSpec(str(tmp_path / "good"), holdout=0.2),
        other_split="test",
        changed=DatasetSpec(str(tmp_path / "changed"), holdout=0.2),
    )
    await check(case)
    await store.aclose()


@pytest.mark.parametrize("check", contracts.BLOB_STORE, ids=contracts.name)
async def test_files_as_a_blob_store(check, tmp_path, home):
    store = adapter("blob_store.files", home=home)

    def tamper(ref):
        (path,) = (p for p in home.rglob("*") if p.is_file() and ref.sha256.endswith(p.name[-32:]))
        path.chmod(0o644)
        path.write_bytes(path.read_bytes() + b"!")

    directory = tmp_path / "elsewhere"
    directory.mkdir()
    await check(contracts.BlobStoreCase(store, directory, tamper))
    await store.aclose()


@pytest.mark.parametrize("check", contracts.EVALUATOR, ids=contracts.name)
async def test_metrics_as_an_evaluator(check):
    await check(contracts.EvaluatorCase(adapter("evaluator.metrics")))


@pytest.mark.parametrize("check", contracts.MODEL_REGISTRY, ids=contracts.name)
async def test_sqlite_as_a_model_registry(check, home):
    registry = adapter("model_registry.sqlite", home=home)
    await check(contracts.ModelRegistryCase(registry))
    await registry.aclose()
