"""The contract of port ``dataset_store``: rows by index that never change, splits that never share one.

Knows no adapter. Read next: ``crucible_kitchen.ports.dataset_store``.
"""

import json
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import anyio

from crucible_kitchen.errors import CrucibleError, DatasetNotFound, EmptyDataset
from crucible_kitchen.ports import Dataset, DatasetSpec, DatasetStore
from crucible_kitchen.testing.contracts.base import Suite, refuses, skip

__all__ = ["DATASET_STORE", "DatasetStoreCase"]


@dataclass(frozen=True)
class DatasetStoreCase:
    """A dataset store under test.

    Attributes:
        store: the adapter.
        spec: a dataset of five rows or more.
        other_split: another split of it, if it has one.
        missing: a spec whose name does not exist.
        empty: a spec without rows, if there is one.
        changed: a spec of the same shape with other content, if there is one.
        broken: a spec with a row that cannot be read, and a text that stands in that row.
    """

    store: DatasetStore
    spec: DatasetSpec
    other_split: str = ""
    missing: DatasetSpec | None = None
    empty: DatasetSpec | None = None
    changed: DatasetSpec | None = None
    broken: tuple[DatasetSpec, str] | None = None

    @property
    def adapter(self) -> DatasetStore:
        """The store."""
        return self.store


DATASET_STORE: Suite[DatasetStoreCase] = Suite("dataset_store")


async def _texts(dataset: Dataset) -> list[str]:
    rows = await dataset.rows(range(len(dataset)))
    return [json.dumps(dict(row), sort_keys=True, default=str) for row in rows]


@DATASET_STORE
async def it_knows_its_name_split_and_size(case: DatasetStoreCase) -> None:
    """As it was opened."""
    dataset = await case.store.load(case.spec)
    assert (dataset.name, dataset.split) == (case.spec.name, case.spec.split), "another name or split"
    assert len(dataset) == len(await _texts(dataset)) >= 5, "the size is not the number of rows"


@DATASET_STORE
async def rows_come_in_the_order_asked_for(case: DatasetStoreCase) -> None:
    """Also with repetitions, also none."""
    dataset = await case.store.load(case.spec)
    every = await dataset.rows(range(len(dataset)))
    for indices in ([3, 0, 4, 0], [len(dataset) - 1], []):
        assert list(await dataset.rows(indices)) == [every[i] for i in indices], f"rows {indices} are others"


@DATASET_STORE
async def an_index_always_gives_the_same_row(case: DatasetStoreCase) -> None:
    """Whoever else reads, and when the dataset is opened anew."""
    dataset = await case.store.load(case.spec)
    first = await _texts(dataset)
    seen: list[list[str]] = []

    async def read() -> None:
        seen.append(await _texts(dataset))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(read)
    assert all(texts == first for texts in seen), "reading at the same time gave other rows"
    assert await _texts(await case.store.load(case.spec)) == first, "opening again gave other rows"


@DATASET_STORE
async def changing_a_returned_row_changes_nothing(case: DatasetStoreCase) -> None:
    """Datasets are immutable."""
    dataset = await case.store.load(case.spec)
    before = await _texts(dataset)
    row: Any = (await dataset.rows([0]))[0]
    if isinstance(row, MutableMapping):
        row.clear()
    assert await _texts(dataset) == before, "a row that was handed out is the dataset's own"


@DATASET_STORE
async def an_index_out_of_range_is_refused(case: DatasetStoreCase) -> None:
    """By ``rows`` with ``IndexError``."""
    dataset = await case.store.load(case.spec)
    for index in (len(dataset), -len(dataset) - 1):
        with refuses(IndexError, what=f"row {index} of {len(dataset)}"):
            await dataset.rows([0, index])


@DATASET_STORE
async def a_selection_has_its_rows_in_its_order(case: DatasetStoreCase) -> None:
    """Also a selection of a selection; the source stays as it is."""
    dataset = await case.store.load(case.spec)
    every = await _texts(dataset)
    some = dataset.select([4, 1, 3])
    assert len(some) == 3, "another selection"
    assert await _texts(some) == [every[4], every[1], every[3]], "another selection"
    assert await _texts(some.select([2, 0])) == [every[3], every[4]], "another selection of the selection"
    assert await _texts(dataset) == every, "selecting changed the dataset"
    with refuses(IndexError, what="row 3 of a selection of 3"):
        await some.rows([3])


@DATASET_STORE
async def a_fingerprint_is_the_contents(case: DatasetStoreCase) -> None:
    """Equal for equal rows in equal order, another for any other."""
    dataset = await case.store.load(case.spec)
    fingerprint = await dataset.fingerprint()
    assert len(fingerprint) == 64, f"{fingerprint!r} is not a sha256 in hex"
    assert int(fingerprint, 16) >= 0, f"{fingerprint!r} is not a sha256 in hex"
    assert await (await case.store.load(case.spec)).fingerprint() == fingerprint, "opening again changed it"
    size = len(dataset)
    others = {
        "fewer rows": dataset.select(range(size - 1)),
        "another order": dataset.select([1, 0, *range(2, size)]),
        "a limit": await case.store.load(replace(case.spec, limit=size - 1)),
    }
    if case.changed is not None:
        others["other content"] = await case.store.load(case.changed)
    for what, other in others.items():
        assert await other.fingerprint() != fingerprint, f"{what} did not change the fingerprint"
    assert await dataset.select(range(size)).fingerprint() == fingerprint, "selecting all rows changed it"


@DATASET_STORE
async def a_limit_takes_the_first_rows(case: DatasetStoreCase) -> None:
    """At most so many."""
    every = await _texts(await case.store.load(case.spec))
    some = await case.store.load(replace(case.spec, limit=3))
    assert await _texts(some) == every[:3], "a limit of 3 gave other rows"
    many = await case.store.load(replace(case.spec, limit=len(every)))
    assert len(many) == len(every), "a limit of all rows gave another number"


@DATASET_STORE
async def splits_share_no_row(case: DatasetStoreCase) -> None:
    """Whatever is held out was not trained on."""
    if not case.other_split:
        skip("it has one split")
    one = await _texts(await case.store.load(case.spec))
    other = await _texts(await case.store.load(replace(case.spec, split=case.other_split)))
    shared = set(one) & set(other)
    assert not shared, f"{len(shared)} rows are in both splits"


@DATASET_STORE
async def a_name_or_split_that_does_not_exist_is_not_found(case: DatasetStoreCase) -> None:
    """With ``DatasetNotFound``."""
    if case.missing is not None:
        with refuses(DatasetNotFound, what="loading a name that does not exist"):
            await case.store.load(case.missing)
    with refuses(DatasetNotFound, what="loading a split that does not exist"):
        await case.store.load(replace(case.spec, split="no-such-split"))


@DATASET_STORE
async def an_empty_dataset_is_refused(case: DatasetStoreCase) -> None:
    """When it is loaded."""
    if case.empty is None:
        skip("it has no empty dataset")
    with refuses(EmptyDataset, what="loading a dataset without rows"):
        await case.store.load(case.empty)


@DATASET_STORE
async def an_error_shows_no_row(case: DatasetStoreCase) -> None:
    """Rows never get into messages, hints or what caused them, for these end in logs."""
    if case.broken is None:
        skip("it has no broken row")
    spec, content = case.broken
    with refuses(CrucibleError, what="reading a broken row") as refusal:
        dataset = await case.store.load(spec)
        await dataset.rows(range(len(dataset)))
    assert isinstance(refusal.error, CrucibleError)
    assert content not in f"{refusal.error} {refusal.error.hint}", "the error shows the row"
