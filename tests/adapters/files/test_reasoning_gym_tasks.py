"""The problems of the reasoning-gym package as a dataset."""

import json

import pytest

from crucible_kitchen.errors import ConfigError, DatasetNotFound, MissingExtra
from crucible_kitchen.ports import DatasetSpec
from crucible_kitchen.testing import contracts
from crucible_kitchen_files import FilesDatasetStore

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def gym():
    """Skip where the package is not installed."""
    return pytest.importorskip("reasoning_gym", reason="needs the extra [envs]: pip install 'crucible-kitchen[envs]'")


async def load(name: str, split: str = "train", **values):
    return await FilesDatasetStore().load(DatasetSpec(f"reasoning_gym:{name}", split, **values))


@pytest.mark.parametrize("check", contracts.DATASET_STORE, ids=contracts.name)
async def test_the_contract_of_the_port_is_kept(check):
    case = contracts.DatasetStoreCase(
        FilesDatasetStore(),
        DatasetSpec("reasoning_gym:chain_sum", limit=40),
        other_split="test",
        missing=DatasetSpec("reasoning_gym:chain_som"),
        changed=DatasetSpec("reasoning_gym:chain_sum", limit=40, seed=1),
    )
    await check(case)


async def test_the_answers_are_those_the_package_accepts(gym):
    dataset = await load("chain_sum", limit=30)
    scorer = gym.get_score_answer_fn("chain_sum")
    for row in await dataset.rows(range(30)):
        entry = {"question": row["question"], "answer": row["answer"], "metadata": {"source_dataset": "chain_sum"}}
        assert scorer(row["answer"], entry) == 1.0


@pytest.mark.parametrize("name", ["chain_sum", "coin_flip"])
async def test_no_question_is_in_two_splits_whatever_the_seeds(name):
    questions = {}
    for seed, split in enumerate(("train", "validation", "test")):
        dataset = await load(name, split, limit=60, seed=seed)
        questions[split] = {row["question"] for row in await dataset.rows(range(len(dataset)))}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


async def test_the_tasks_own_settings_are_options_and_wrong_ones_are_refused():
    options = (("min_terms", "2"), ("max_terms", "2"), ("allow_negation", "true"))
    dataset = await load("chain_sum", limit=20, options=options)
    for row in await dataset.rows(range(20)):
        assert len(row["question"].partition(":")[2].replace("- ", "+ ").split(" + ")) == 2, json.dumps(row)
    for wrong in ((("min_termz", "2"),), (("min_terms", "9"), ("max_terms", "2")), (("size", "9"),)):
        with pytest.raises(ConfigError, match="refused its dataset_options"):
            await load("chain_sum", options=wrong)


async def test_an_unknown_task_or_split_names_what_there_is():
    with pytest.raises(DatasetNotFound) as caught:
        await load("chain_som")
    assert "reasoning_gym:chain_sum" in str(caught.value.hint)
    with pytest.raises(DatasetNotFound, match="no split"):
        await load("chain_sum", "other")


async def test_without_the_package_the_extra_is_named(monkeypatch):
    # the package is installed here; what is tested is the answer to its absence
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra) as caught:
        await load("chain_sum")
    assert caught.value.hint == "pip install 'crucible-kitchen[envs]'"
