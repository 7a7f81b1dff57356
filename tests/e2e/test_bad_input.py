"""Bad input, given as a person gives it: one clear error, the right exit code, no traceback, nothing saved is lost."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

NOOP = tuple(
    f"--adapter={port}=noop" for port in ("training_client", "evaluator", "model_registry", "blob_store", "llm_client")
)
ONE_THREAD = "--adapter=training_client=torch,threads=1"
ROWS = [{"prompt": f"say {n}", "completion": str(n)} for n in range(32)]
UNWRITTEN = '''
"""A workflow whose last stage reads what nobody wrote."""

from crucible_kitchen import Workflow, stage


@stage()
async def taste(soup: str) -> None:
    """Read what should be there."""


dinner = Workflow("dinner", taste)
'''


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def told(ended: Any, *, exit_code: int, error: str, where: str | None) -> str:
    """Check an error on both channels and return it: what happened, and what to do."""
    assert ended.code == exit_code, ended.err
    assert "Traceback" not in ended.err + ended.out
    answer = ended.json
    assert answer["status"] == "failed"
    assert (answer["error"]["code"], answer["error"]["where"]) == (error, where), answer["error"]
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error [")]
    assert line.startswith(f"error [{error}] {where or ''}")
    if answer["error"]["hint"]:
        assert any(line.startswith("hint: ") for line in ended.err.splitlines())
    return f"{answer['error']['message']}\n{answer['error']['hint']}"


@pytest.fixture
def run(command: Any, home: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs the supervised workflow on good rows, in a directory of the test's own, unless a test says otherwise."""
    write(tmp_path / "rows.jsonl", ROWS)

    def call(*given: object, adapters: tuple[str, ...] = NOOP, at: Path = home) -> Any:
        return command("run", *given, *adapters, "--json", home=at, cwd=tmp_path)

    return call


def supervised(dataset: str = "rows.jsonl", model: str = "toy") -> tuple[str, ...]:
    """What every run of these tests begins with."""
    return ("supervised", f"model={model}", f"dataset={dataset}", "batch_size=8")


def test_the_same_runs_complete_on_good_input(run: Any) -> None:
    ended = run(*supervised())
    assert ended.code == 0, ended.err
    assert ended.json["status"] == "completed"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("learning_rte=1e-3", ("unknown config key 'learning_rte'", "did you mean 'learning_rate'?")),
        ("batch_size=many", ("config key 'batch_size'", "integer")),
    ],
)
@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_a_key_that_is_unknown_or_of_another_type(
    run: Any, home: Path, given: str, words: tuple[str, ...], option: tuple[str, ...]
) -> None:
    begin = ("supervised", "model=toy", "dataset=rows.jsonl")
    message = told(run(*begin, given, *option), exit_code=2, error="config.invalid", where=None)
    assert all(word in message for word in words)
    assert not (home / "runs").exists()


def test_an_empty_dataset(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "empty.jsonl", [])
    message = told(run(*supervised("empty.jsonl")), exit_code=1, error="data.empty", where="supervised/load_dataset")
    assert "empty.jsonl" in message


def test_a_row_without_its_field_is_named_and_so_is_the_field(run: Any, tmp_path: Path) -> None:
    rows = [*ROWS[:5], {"prompt": "words that stay private"}, *ROWS[5:]]
    ended = run(*supervised(write(tmp_path / "bad.jsonl", rows).name), "holdout=0")
    message = told(ended, exit_code=1, error="data.row", where="supervised/build_dataset")
    assert "row 5" in message
    assert "completion" in message
    assert "private" not in ended.out + ended.err


def test_a_line_that_is_no_json_is_named(run: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "torn.jsonl", ROWS)
    file.write_text(file.read_text(encoding="utf-8") + '{"prompt": "say', encoding="utf-8")
    ended = run(*supervised("torn.jsonl"))
    assert ended.code == 1
    assert ended.json["error"]["code"].startswith("data"), ended.json["error"]
    assert str(len(ROWS)) in ended.json["error"]["message"]
    assert "Traceback" not in ended.err


def test_a_sequence_longer_than_the_context_is_cut_and_counted_or_refused(run: Any, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "say much", "completion": "a" * 5000}]
    begin = (*supervised(write(tmp_path / "long.jsonl", rows).name, model="tiny"), "holdout=0", "max_steps=1")
    cut = run(*begin, adapters=(ONE_THREAD,))
    assert cut.code == 0, cut.err
    assert cut.json["metrics"]["data.prepared.truncated"] == 1
    assert "1 rows were cut" in cut.err
    refused = run(*begin, "on_too_long=error", adapters=(ONE_THREAD,))
    message = told(refused, exit_code=1, error="data.too_long", where="supervised/build_dataset")
    assert f"row {len(ROWS)}" in message
    assert "on_too_long" in message


def test_a_model_directory_that_does_not_exist(run: Any) -> None:
    ended = run(*supervised(model="./no/such/model"), adapters=())
    message = told(ended, exit_code=1, error="not_found.model", where="supervised/init_session")
    assert "./no/such/model" in message


def test_a_directory_that_holds_no_model(run: Any, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    told(
        run(*supervised(model="./nothing"), adapters=()),
        exit_code=1,
        error="not_found.model",
        where="supervised/init_session",
    )


def test_an_adapter_that_lacks_a_capability(run: Any, home: Path) -> None:
    lacking = ('--adapter=training_client=noop,capabilities={"sampling": false}', *NOOP[1:])
    ended = run(*supervised(), adapters=lacking)
    assert ended.code == 2
    assert ended.json["error"]["code"] == "workflow.invalid"
    assert "supervised/evaluate: the training backend cannot sample" in ended.err
    assert "evaluator=none" in ended.err
    assert "Traceback" not in ended.err
    assert not (home / "runs").exists()


def test_a_stage_that_reads_what_nobody_wrote(run: Any, home: Path, tmp_path: Path) -> None:
    (tmp_path / "cooking.py").write_text(UNWRITTEN, encoding="utf-8")
    ended = run("cooking.py:dinner", adapters=())
    assert ended.code == 2
    assert ended.json["error"]["code"] == "workflow.invalid"
    assert "dinner/taste" in ended.err
    assert "'soup'" in ended.err
    assert "Traceback" not in ended.err
    assert not (home / "runs").exists()


def test_a_loss_that_is_not_finite_stops_with_the_batch_and_keeps_the_last_checkpoint(run: Any, home: Path) -> None:
    given = ("learning_rate=1e30", "grad_clip_norm=0", "save_every=1", "epochs=4")
    ended = run(*supervised(model="tiny"), *given, adapters=(ONE_THREAD,))
    message = told(
        ended, exit_code=1, error="training.non_finite_loss", where="supervised/epoch[0]/batch[1]/train_step"
    )
    assert message.count("train/") == 8
    assert "learning_rate" in message
    (saved,) = (home / "runs" / ended.json["run_id"]).glob("*.safetensors")
    assert saved.name == "checkpoint-000001.safetensors"
    assert [artifact["name"] for artifact in ended.json["artifacts"]] == ["step-1"]


def test_debug_shows_the_traceback(command: Any, home: Path) -> None:
    arguments = ("run", *supervised(model="./no/such/model"), "--debug")
    assert "Traceback" in command(*arguments, home=home).err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a given size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small disk")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full_when_a_checkpoint_is_saved_keeps_the_checkpoint_before(
    run: Any, command: Any, small_disk: Any
) -> None:
    home = small_disk("8m")  # room for the records and one state of tiny
    ended = run(*supervised(model="tiny"), "save_every=1", adapters=(ONE_THREAD,), at=home)
    message = told(ended, exit_code=1, error="store.full", where="supervised/epoch[0]/batch[1]/save_checkpoint")
    assert "free some space" in message
    (saved,) = (home / "runs" / ended.json["run_id"]).iterdir()
    (artifact,) = ended.json["artifacts"]
    assert artifact["name"] == "step-1"
    assert saved.stat().st_size == artifact["size"], "half a checkpoint was left, or the whole one lost"
    (row,) = command("runs", "--json", home=home).json
    assert (row["run_id"], row["status"]) == (ended.json["run_id"], "failed")


@pytest.mark.parametrize(("size", "what"), [("2m", "export"), ("4m", "blob")])
def test_a_disk_that_is_full_when_the_weights_are_saved_fails_the_run(
    run: Any, command: Any, small_disk: Any, size: str, what: str
) -> None:
    home = small_disk(size)
    ended = run(*supervised(model="tiny"), "max_steps=1", "save_every=0", adapters=(ONE_THREAD,), at=home)
    message = told(ended, exit_code=1, error="store.full", where="supervised/save_final")
    assert what in message
    assert command("models", "--json", home=home).json == []


def test_a_disk_without_room_for_the_records_of_a_run(run: Any, small_disk: Any) -> None:
    place = small_disk("80k")
    ended = run(*supervised(), at=place)
    assert ended.code == 1
    assert ended.json["status"] == "failed"
    assert ended.json["error"]["code"] == "store.full"
    assert "Traceback" not in ended.err


def test_a_failed_run_promises_no_weights_that_are_not_there(command: Any, small_disk: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    home = small_disk("2m")
    ended = command("run", *supervised(model="tiny"), "max_steps=1", ONE_THREAD, "--quiet", home=home, cwd=tmp_path)
    assert ended.code == 1
    head, *facts = ended.out.splitlines()
    assert " failed after " in head
    assert [line.split()[0] for line in facts] == ["look"]
