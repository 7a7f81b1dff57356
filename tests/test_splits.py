"""Splits are disjoint and stable, whoever cuts them; the fingerprint is of the content."""

import datetime
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_kitchen.errors import ConfigError, DatasetNotFound, EmptyDataset, RowError
from crucible_kitchen.ports import DatasetSpec
from crucible_kitchen.splits import (
    SPLITS,
    IndexedDataset,
    canonical_row,
    check_options,
    cut_split,
    pick_split,
)


@given(
    rows=st.integers(0, 300),
    holdout=st.one_of(st.floats(0, 0.999), st.integers(1, 50).map(float)),
    seed=st.integers(0, 1000),
)
def test_the_three_splits_share_no_row_and_are_all_rows_together(rows, holdout, seed):
    parts = [cut_split(rows, split, holdout=holdout, seed=seed).tolist() for split in SPLITS]
    assert sorted(index for part in parts for index in part) == list(range(rows))


@pytest.mark.parametrize(
    ("holdout", "sizes"), [(0.1, (90, 5, 5)), (0.0, (100, 0, 0)), (25, (75, 12, 13)), (1, (99, 0, 1))]
)
def test_holdout_is_a_share_or_a_number_halved_between_validation_and_test(holdout, sizes):
    assert tuple(len(cut_split(100, split, holdout=holdout, seed=0)) for split in SPLITS) == sizes


def test_a_share_of_a_small_dataset_still_holds_out_a_row_unless_it_is_the_only_one():
    assert len(cut_split(5, "test", holdout=0.01, seed=0)) == 1
    assert len(cut_split(1, "train", holdout=0.1, seed=0)) == 1


def test_the_seed_decides_the_cut():
    cuts = {tuple(cut_split(100, "test", holdout=0.1, seed=seed)) for seed in range(20)}
    assert len(cuts) == 20
    assert cut_split(20, "test", holdout=0.2, seed=0).tolist() == [4, 19]


def test_training_rows_keep_the_sources_order_and_the_first_held_out_rows_are_a_fair_sample():
    train, test = (cut_split(1000, split, holdout=0.5, seed=0).tolist() for split in ("train", "test"))
    assert train == sorted(train)
    assert 300 < sum(test[:50]) / 50 < 700


def test_a_limit_takes_the_first_rows():
    whole = pick_split(DatasetSpec("x", "test"), {"train": 100})[1].tolist()
    assert pick_split(DatasetSpec("x", "test", limit=3), {"train": 100})[1].tolist() == whole[:3]
    assert pick_split(DatasetSpec("x", "test", limit=300), {"train": 100})[1].tolist() == whole


def test_a_source_with_several_splits_is_taken_as_it_is():
    sizes = {"train": 10, "val": 4, "extra": 2}
    assert pick_split(DatasetSpec("x", "train"), sizes)[1].tolist() == list(range(10))
    for name in ("validation", "val", "dev"):
        assert pick_split(DatasetSpec("x", name), sizes)[0] == "val"
    assert pick_split(DatasetSpec("x", "extra"), sizes)[0] == "extra"
    with pytest.raises(DatasetNotFound, match="no split 'test'") as caught:
        pick_split(DatasetSpec("x", "test"), sizes)
    assert "train, val, extra" in str(caught.value.hint)


def test_nothing_is_cut_off_a_source_that_has_another_split_than_train_only():
    assert pick_split(DatasetSpec("x", "test"), {"test": 10})[1].tolist() == list(range(10))
    with pytest.raises(DatasetNotFound):
        pick_split(DatasetSpec("x", "train"), {"test": 10})


def test_without_holdout_the_only_split_is_whole_and_the_others_are_not_there():
    assert len(pick_split(DatasetSpec("x", "train", holdout=0), {"train": 10})[1]) == 10
    with pytest.raises(DatasetNotFound) as caught:
        pick_split(DatasetSpec("x", "test", holdout=0), {"train": 10})
    assert "holdout" in str(caught.value.hint)


def test_a_split_without_rows_says_how_many_the_source_has():
    with pytest.raises(EmptyDataset) as caught:
        pick_split(DatasetSpec("x", "train", holdout=50), {"train": 10})
    assert "10 rows" in str(caught.value.hint)
    with pytest.raises(EmptyDataset):
        pick_split(DatasetSpec("x", "train"), {"train": 0})


def test_unknown_options_of_a_source_are_refused():
    spec = DatasetSpec("x", options=(("difficulty", "2"),))
    assert check_options(spec, ["difficulty"]) == {"difficulty": "2"}
    with pytest.raises(ConfigError, match="no option 'difficulty'"):
        check_options(spec, [])


def test_canonical_rows_do_not_depend_on_the_order_of_fields_or_on_numpy():
    plain = {"b": [1, 2], "a": "ä\ud800", "c": 0.5}
    assert canonical_row(plain) == canonical_row({"c": np.float64(0.5), "a": "ä\ud800", "b": np.array([1, 2])})
    day = canonical_row({"day": datetime.date(2026, 1, 2), "raw": b"x"})
    assert b"2026-01-02" in day
    with pytest.raises(RowError, match="row 3, field 'object'"):
        canonical_row({"x": object()}, 3)


def dataset(n: int) -> IndexedDataset:
    return IndexedDataset("x", "train", lambda indices: [{"i": i} for i in indices], range(n))


@pytest.mark.anyio
async def test_the_fingerprint_is_the_hash_of_the_rows_in_order():
    expected = hashlib.sha256(b"".join(b'{"i":%d}\n' % i for i in range(1000))).hexdigest()
    assert await dataset(1000).fingerprint() == expected
    assert await dataset(1000).select(range(999, -1, -1)).fingerprint() != expected
    assert await dataset(1000).select(range(1000)).fingerprint() == expected


@pytest.mark.anyio
async def test_rows_and_selections_are_by_index_in_the_order_asked_for():
    chosen = dataset(10).select([7, 3, 3])
    assert len(chosen) == 3
    assert await chosen.rows([2, 0]) == [{"i": 3}, {"i": 7}]
    assert await chosen.select([0]).rows([0]) == [{"i": 7}]
    assert await chosen.rows([]) == []
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            await chosen.rows([wrong])
        with pytest.raises(IndexError):
            chosen.select([wrong])
