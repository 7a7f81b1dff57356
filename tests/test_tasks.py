"""The built-in tasks: right answers, disjoint splits, stable problems."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_kitchen.errors import ConfigError, DatasetNotFound
from crucible_kitchen.tasks import TASKS, TaskRows, open_task, permuted


def prompts(name: str, split: str, seed: int = 0, limit: int = 0, **options: str) -> list[str]:
    return [row["prompt"] for row in open_task(name, split=split, seed=seed, limit=limit, options=options)]


def test_two_digit_sums_are_ten_thousand_problems_in_three_disjoint_splits():
    splits = {split: prompts("sums", split) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 9000, "validation": 500, "test": 500}
    assert len({prompt for rows in splits.values() for prompt in rows}) == 10_000


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("difficulty", ["1", "2"])
def test_no_problem_is_in_two_splits_whatever_the_seeds(name, difficulty):
    train = set(prompts(name, "train", seed=3, limit=20_000, difficulty=difficulty))
    validation = set(prompts(name, "validation", seed=4, difficulty=difficulty))
    test = set(prompts(name, "test", seed=5, difficulty=difficulty))
    assert train
    assert validation
    assert test
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_the_test_problems_are_the_same_in_every_run_and_only_their_order_changes():
    first, second = prompts("sums", "test", seed=1), prompts("sums", "test", seed=2)
    assert first != second
    assert sorted(first) == sorted(second)


def test_the_same_seed_gives_the_same_rows_and_a_smaller_limit_their_beginning():
    assert prompts("sort", "train", seed=7, limit=50) == prompts("sort", "train", seed=7)[:50]


def test_these_rows_never_change_because_published_results_stand_on_them():
    assert prompts("sums", "train")[:3] == ["40+82=", "71+58=", "99+66="]
    assert prompts("parity", "test", difficulty="1")[:2] == ["00100001?", "01110111?"]


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_verified_and_every_wrong_answer_refused(name):
    task, rng = TASKS[name], Random(0)
    for row in open_task(name, limit=100, options={"difficulty": str(task.hardest)}):
        assert task.verify(row, f" {row['completion']}\n")
        assert not task.verify(row, task.wrong_answer(row, rng))
        assert not task.verify(row, "")


def test_the_answers_are_what_the_task_says():
    for row in open_task("sums", limit=200, options={"difficulty": "3"}):
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(row["completion"])
        assert max(len(a), len(b)) <= 3
    for row in open_task("reverse", limit=50):
        assert row["prompt"][:-1][::-1] == row["completion"]
    for row in open_task("sort", limit=50):
        assert sorted(row["prompt"][:-1]) == list(row["completion"])
    for row in open_task("parity", limit=50):
        assert row["labels"][row["prompt"].count("1") % 2] == row["completion"]


@pytest.mark.parametrize("difficulty", ["0", "10", "-1", "two", "1.5", ""])
def test_a_difficulty_out_of_range_is_refused_with_the_range(difficulty):
    with pytest.raises(ConfigError, match="from 1 to 9"):
        open_task("sums", options={"difficulty": difficulty})


def test_unknown_tasks_options_and_splits_name_what_there_is():
    with pytest.raises(DatasetNotFound) as caught:
        open_task("sum")
    assert "'sums'" in str(caught.value.hint)
    with pytest.raises(DatasetNotFound, match="no split 'dev2'"):
        open_task("sums", split="dev2")
    with pytest.raises(ConfigError, match="no option 'level'"):
        open_task("sums", options={"level": "2"})


def test_an_index_out_of_range_is_an_index_error():
    rows = open_task("sums", limit=3)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            rows[index]


def test_the_hardest_sums_take_no_memory_and_still_have_disjoint_splits():
    rows = open_task("sums", options={"difficulty": "9"})
    assert isinstance(rows, TaskRows)
    assert rows.available == 10**18 - 1000
    assert not set(prompts("sums", "train", limit=2000, difficulty="9")) & set(prompts("sums", "test", difficulty="9"))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 400), key=st.text(max_size=5))
def test_the_permutation_is_one(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))
