"""The local dataset store: the port's contract, every kind of file, splits, and what is refused."""

import csv
import json
import os
from pathlib import Path

import anyio
import pytest

from crucible_kitchen.errors import ConfigError, DataError, DatasetNotFound, EmptyDataset, MissingExtra, RowError
from crucible_kitchen.ports import DatasetSpec, DatasetStore
from crucible_kitchen.tasks import TASKS
from crucible_kitchen.testing import contracts
from crucible_kitchen_files import FilesDatasetStore

pytestmark = pytest.mark.anyio

ROWS = [{"prompt": f"say {i}", "completion": "ä" * (i % 3), "n": i} for i in range(40)]


def write_jsonl(path: Path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows=ROWS, group: int = 7) -> str:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return str(path)


def write_csv(path: Path, rows=ROWS) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


async def load(name: str, split: str = "train", **values):
    return await FilesDatasetStore().load(DatasetSpec(str(name), split, **values))


async def every(dataset) -> list[dict]:
    return [dict(row) for row in await dataset.rows(range(len(dataset)))]


@pytest.mark.parametrize("kind", ["task", "jsonl", "json", "csv", "parquet", "directory"])
@pytest.mark.parametrize("check", contracts.DATASET_STORE, ids=contracts.name)
async def test_the_contract_of_the_port_is_kept(check, kind, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n' * 3 + '{"prompt": "tell nobody"\n')
    other = [{**row, "n": -1} for row in ROWS]
    changed = None
    if kind == "task":
        spec = DatasetSpec("sums", options=(("difficulty", "1"),))
        changed = DatasetSpec("sums", options=(("difficulty", "1"),), seed=1)
    elif kind == "json":
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(ROWS))
        spec = DatasetSpec(str(path))
    elif kind == "directory":
        write_jsonl(tmp_path / "train.jsonl")
        write_jsonl(tmp_path / "test.jsonl", [{"prompt": "held out", "completion": str(i)} for i in range(9)])
        empty.rename(tmp_path.parent / f"{tmp_path.name}-empty.jsonl")
        broken.rename(tmp_path.parent / f"{tmp_path.name}-broken.jsonl")
        empty, broken = (tmp_path.parent / f"{tmp_path.name}-{name}.jsonl" for name in ("empty", "broken"))
        spec = DatasetSpec(str(tmp_path))
    else:
        write = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[kind]
        spec = DatasetSpec(write(tmp_path / f"rows.{kind}"))
        changed = DatasetSpec(write(tmp_path / f"other.{kind}", other))
    await check(
        contracts.DatasetStoreCase(
            FilesDatasetStore(),
            spec,
            other_split="test",
            missing=DatasetSpec(str(tmp_path / "no-such.jsonl")),
            empty=DatasetSpec(str(empty)),
            changed=changed,
            broken=(DatasetSpec(str(broken), holdout=0), "tell nobody"),
        )
    )


async def test_it_is_a_dataset_store():
    assert isinstance(FilesDatasetStore(), DatasetStore)


async def test_the_same_content_has_the_same_fingerprint_in_every_format(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completion"] or "none"} for row in ROWS]
    (tmp_path / "d.json").write_text(json.dumps([dict(reversed(row.items())) for row in rows]))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row) for row in rows))
    names = [
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_csv(tmp_path / "b.csv", rows),
        write_csv(tmp_path / "b.tsv", rows),
        write_parquet(tmp_path / "c.parquet", rows),
        str(tmp_path / "d.json"),
        str(tmp_path / "lines.json"),
    ]
    fingerprints = {await (await load(name)).fingerprint() for name in names}
    assert len(fingerprints) == 1


async def test_rows_are_read_at_random_and_in_the_order_asked_for_across_row_groups(tmp_path):
    for name in (write_parquet(tmp_path / "a.parquet"), write_jsonl(tmp_path / "a.jsonl")):
        dataset = await load(name, holdout=0)
        assert [row["n"] for row in await dataset.rows([39, 0, 7, 6, 39])] == [39, 0, 7, 6, 39]


async def test_many_tasks_can_read_one_parquet_file_at_once(tmp_path):
    dataset = await load(write_parquet(tmp_path / "a.parquet"), holdout=0)
    seen = []

    async def read(i: int) -> None:
        seen.append((i, (await dataset.rows([i]))[0]["n"]))

    async with anyio.create_task_group() as group:
        for i in range(40):
            group.start_soon(read, i)
    assert all(i == n for i, n in seen)


async def test_jsonl_is_not_held_in_memory_and_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \r\n{"text": "two"}\r\n{"text": "three"}')
    assert [row["text"] for row in await every(await load(path, holdout=0))] == ["one", "two", "three"]


async def test_a_bad_line_is_named_by_its_number_and_never_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": secret}\n[1]\n')
    dataset = await load(path, holdout=0)
    with pytest.raises(RowError, match=r"row 1, field 'a.jsonl': line 3 is not JSON \(Expecting value\)") as caught:
        await dataset.rows([0, 1])
    assert caught.value.row == 1
    with pytest.raises(RowError, match="line 4 is not a JSON object"):
        await dataset.rows([2])


async def test_a_file_that_changes_during_a_run_is_refused(tmp_path):
    path = Path(write_jsonl(tmp_path / "a.jsonl"))
    dataset = await load(path)
    write_jsonl(path, ROWS[1:])
    with pytest.raises(DataError, match="changed"):
        await dataset.rows([0])


async def test_bad_csv_json_and_parquet_files_say_what_is_wrong(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n1,2\n3\n")
    with pytest.raises(RowError, match=r"row 1, field 'a\.csv': line 3 has not 2 values"):
        await load(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text('[{"a": 1},\n nothing]')
    with pytest.raises(DataError, match="line 2"):
        await load(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(RowError, match="is int"):
        await load(tmp_path / "b.json")
    (tmp_path / "a.parquet").write_text("nothing")
    with pytest.raises(DataError, match="not a Parquet file"):
        await load(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DatasetNotFound, match="no known kind"):
        await load(tmp_path / "a.txt")


async def test_csv_fields_may_be_long_and_hold_line_breaks(tmp_path):
    rows = [{"prompt": 'a\nb,"c"', "completion": "x" * 300_000}]
    assert await every(await load(write_csv(tmp_path / "a.csv", rows), holdout=0)) == rows


async def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    # pyarrow is installed here; what is tested is the answer to its absence
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra) as caught:
        await load(path)
    assert caught.value.hint == "pip install 'crucible-kitchen[data]'"


async def test_one_file_is_cut_into_disjoint_splits_that_stay_the_same(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl")
    sizes, seen = [], []
    for split in ("train", "validation", "test"):
        rows = await every(await load(name, split, holdout=0.25))
        assert rows == await every(await load(name, split, holdout=0.25))
        sizes.append(len(rows))
        seen += [row["n"] for row in rows]
    assert sizes == [30, 5, 5]
    assert sorted(seen) == list(range(40))


async def test_a_directory_gives_the_splits_its_files_are_named_after(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:10])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[10:20])
    write_csv(tmp_path / "val.csv", ROWS[20:24])
    write_jsonl(tmp_path / "extra.jsonl", ROWS[30:])
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("hello")
    train = await load(tmp_path)
    assert [row["n"] for row in await every(train)] == list(range(20))
    assert [row["n"] for row in await train.rows([15, 3])] == [15, 3]
    assert len(await load(tmp_path, "validation")) == 4
    assert len(await load(tmp_path, "extra")) == 10
    with pytest.raises(DatasetNotFound) as caught:
        await load(tmp_path, "test")
    assert "extra, train, validation" in str(caught.value.hint)


async def test_a_broken_line_in_a_shard_is_named_by_its_row_in_the_whole(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", ROWS[:10])
    (tmp_path / "train-1.jsonl").write_text('{"n": 1}\nbroken\n')
    write_jsonl(tmp_path / "test.jsonl")
    with pytest.raises(RowError, match=r"row 11, field 'train-1.jsonl': line 2 is not JSON"):
        await every(await load(tmp_path))


async def test_a_directory_with_one_file_is_that_file_and_one_without_any_is_nothing(tmp_path):
    with pytest.raises(DatasetNotFound, match="holds no data file"):
        await load(tmp_path)
    write_jsonl(tmp_path / "anything.jsonl")
    assert len(await load(tmp_path)) == 36
    assert len(await load(tmp_path, "test")) == 2


async def test_one_split_in_two_formats_is_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    write_csv(tmp_path / "train.csv")
    with pytest.raises(DataError, match="several formats"):
        await load(tmp_path)


async def test_an_unknown_name_gets_the_tasks_and_what_is_near(tmp_path):
    with pytest.raises(DatasetNotFound) as caught:
        await load("sumz")
    assert "did you mean 'sums'?" in str(caught.value.hint)
    assert ", ".join(TASKS) in str(caught.value.hint)
    write_jsonl(tmp_path / "questions.jsonl")
    with pytest.raises(DatasetNotFound) as caught:
        await load(tmp_path / "question.jsonl")
    assert "questions.jsonl" in str(caught.value.hint)
    with pytest.raises(DatasetNotFound) as caught:
        await load("somebody/some-data")
    assert "dataset_store=huggingface" in str(caught.value.hint)


async def test_built_in_tasks_take_difficulty_and_limit_and_refuse_other_options():
    dataset = await load("sums", limit=20, options=(("difficulty", "3"),))
    assert len(dataset) == 20
    assert len(await load("sums", "dev")) == 500
    with pytest.raises(ConfigError, match="no option 'digits'"):
        await load("sums", options=(("digits", "3"),))


async def test_files_have_no_options_and_say_so(tmp_path):
    with pytest.raises(ConfigError, match="no option 'difficulty'"):
        await load(write_jsonl(tmp_path / "a.jsonl"), options=(("difficulty", "3"),))


async def test_an_empty_file_is_an_empty_dataset(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "a.csv").write_text("")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(EmptyDataset):
            await load(tmp_path / name)


async def test_nothing_outside_of_the_data_root_can_be_opened(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    write_jsonl(root / "in.jsonl")
    outside = write_jsonl(tmp_path / "out.jsonl")
    (root / "link.jsonl").symlink_to(outside)
    store = FilesDatasetStore(data_root=str(root))
    assert len(await store.load(DatasetSpec("in.jsonl"))) == 36
    assert len(await store.load(DatasetSpec("sums", "test"))) == 500
    for name in ("../out.jsonl", outside, "link.jsonl"):
        with pytest.raises(DatasetNotFound, match="not below the data root"):
            await store.load(DatasetSpec(name))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every file")
async def test_a_file_that_may_not_be_read_is_not_found(tmp_path):
    path = Path(write_jsonl(tmp_path / "a.jsonl"))
    os.chmod(path, 0)
    with pytest.raises(DatasetNotFound, match="Permission denied"):
        await load(path)


async def test_a_fingerprint_can_be_cancelled_and_asked_for_again(tmp_path):
    dataset = await load(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 20_000))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await dataset.fingerprint()
    assert scope.cancelled_caught
    assert len(await dataset.fingerprint()) == 64
