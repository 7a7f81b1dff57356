"""The store over the package ``datasets``: local datasets in its formats, splits, and life without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crucible_kitchen.errors import ConfigError, DataError, DatasetNotFound, EmptyDataset, MissingExtra
from crucible_kitchen.ports import DatasetSpec, DatasetStore
from crucible_kitchen.testing import contracts
from crucible_kitchen_files import FilesDatasetStore
from crucible_kitchen_huggingface import HuggingFaceDatasetStore

datasets = pytest.importorskip("datasets", reason="needs the extra [data]: pip install 'crucible-kitchen[data]'")
pytestmark = pytest.mark.anyio

ROWS = [{"prompt": f"say {i}", "completion": str(i), "turns": [{"role": "user", "content": "x"}]} for i in range(40)]


@pytest.fixture
def store(tmp_path: Path) -> HuggingFaceDatasetStore:
    return HuggingFaceDatasetStore(cache_dir=str(tmp_path / "cache"))


def saved(path: Path, rows=ROWS) -> str:
    datasets.Dataset.from_list(list(rows)).save_to_disk(str(path))
    return str(path)


def saved_splits(path: Path, **splits: list[dict]) -> str:
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(path))
    return str(path)


def files(path: Path, **splits: str) -> str:
    path.mkdir()
    for name, text in splits.items():
        (path / f"{name}.jsonl").write_text(text)
    return str(path)


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("kind", ["saved", "splits", "files"])
@pytest.mark.parametrize("check", contracts.DATASET_STORE, ids=contracts.name)
async def test_the_contract_of_the_port_is_kept(check, kind, store, tmp_path):
    if kind == "saved":
        name, other = saved(tmp_path / "a"), saved(tmp_path / "b", [{**row, "completion": "?"} for row in ROWS])
    elif kind == "splits":
        name = saved_splits(tmp_path / "a", train=ROWS[:30], test=ROWS[30:])
        other = saved_splits(tmp_path / "b", train=ROWS[1:30], test=ROWS[30:])
    else:
        name = files(tmp_path / "a", train=lines(ROWS[:30]), test=lines(ROWS[30:]))
        other = files(tmp_path / "b", train=lines(ROWS[1:30]))
    case = contracts.DatasetStoreCase(
        store,
        DatasetSpec(name),
        other_split="test",
        missing=DatasetSpec(str(tmp_path / "no" / "such")),
        empty=DatasetSpec(saved(tmp_path / "empty", ROWS[:3]), "validation"),
        changed=DatasetSpec(other),
        broken=(DatasetSpec(files(tmp_path / "broken", train='{"a": 1}\n{"a": tell nobody\n')), "tell nobody"),
    )
    await check(case)


async def test_it_is_a_dataset_store(store):
    assert isinstance(store, DatasetStore)


async def test_a_dataset_has_the_same_fingerprint_and_cut_as_the_same_rows_in_a_file(store, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS))
    name = saved(tmp_path / "a")
    for split in ("train", "validation", "test"):
        here = await store.load(DatasetSpec(name, split, seed=3))
        there = await FilesDatasetStore().load(DatasetSpec(str(file), split, seed=3))
        assert await here.fingerprint() == await there.fingerprint()


async def test_a_datasets_own_splits_are_taken_as_they_are(store, tmp_path):
    name = saved_splits(tmp_path / "a", train=ROWS[:30], val=ROWS[30:34], extra=ROWS[34:])
    assert len(await store.load(DatasetSpec(name))) == 30
    assert len(await store.load(DatasetSpec(name, "validation"))) == 4
    assert len(await store.load(DatasetSpec(name, "extra", limit=2))) == 2
    with pytest.raises(DatasetNotFound) as caught:
        await store.load(DatasetSpec(name, "test"))
    assert "train, val, extra" in str(caught.value.hint)


async def test_a_split_without_rows_is_empty(store, tmp_path):
    empty = datasets.Dataset.from_dict({"prompt": []})
    datasets.DatasetDict({"train": empty, "test": empty}).save_to_disk(str(tmp_path / "a"))
    with pytest.raises(EmptyDataset):
        await store.load(DatasetSpec(str(tmp_path / "a")))


async def test_files_that_are_not_what_they_should_be_are_data_errors(store, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        await store.load(DatasetSpec(files(tmp_path / "a", train='{"a": 1}\n{"a": secret\n')))


async def test_an_unknown_option_configuration_or_empty_directory_says_what_there_is(store, tmp_path):
    name = files(tmp_path / "a", train=lines(ROWS))
    with pytest.raises(ConfigError, match="no option 'difficulty'"):
        await store.load(DatasetSpec(name, options=(("difficulty", "2"),)))
    with pytest.raises(DatasetNotFound) as caught:
        await store.load(DatasetSpec(name, options=(("config", "french"),)))
    assert "default" in str(caught.value.hint)
    with pytest.raises(DatasetNotFound):
        await store.load(DatasetSpec(files(tmp_path / "b")))


OFFLINE = """
import anyio, sys
from crucible_kitchen.errors import DatasetNotFound
from crucible_kitchen.ports import DatasetSpec
from crucible_kitchen_huggingface import HuggingFaceDatasetStore

async def main():
    store = HuggingFaceDatasetStore(cache_dir=sys.argv[1])
    try:
        await store.load(DatasetSpec("some-owner/some-data"))
    except DatasetNotFound as error:
        print(error, "|", error.hint)
    print(len(await store.load(DatasetSpec(sys.argv[2]))))

anyio.run(main)
"""


def test_without_a_network_a_hub_id_is_not_found_with_advice_and_local_data_still_opens(tmp_path):
    # In a process of its own, because the switch is read when the package is imported.
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "cache"), saved(tmp_path / "a")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, size = done.stdout.splitlines()
    assert "'some-owner/some-data' is not in the local cache" in message
    assert "HF_HUB_OFFLINE" in message
    assert size == "36"


async def test_without_the_package_the_extra_is_named(store, monkeypatch):
    # the package is installed here; what is tested is the answer to its absence
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra) as caught:
        await store.load(DatasetSpec("x"))
    assert caught.value.hint == "pip install 'crucible-kitchen[data]'"
