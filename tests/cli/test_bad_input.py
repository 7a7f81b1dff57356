"""Bad input to a training run: one clear error with the stage's path, the right exit code, nothing lost."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NOOP = (
    "--adapter=training_client=noop",
    "--adapter=evaluator=noop",
    "--adapter=model_registry=noop",
    "--adapter=blob_store=noop",
)
ROWS = [{"prompt": f"say {n}", "completion": str(n)} for n in range(8)]


def write(path: Path, rows: Sequence[object]) -> str:
    """Write rows as JSON lines and return the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def train(cli: Any, dataset: str, *more: str) -> Any:
    """Train the toy model on a file."""
    return cli("run", "supervised", "model=toy", f"dataset={dataset}", *NOOP, *more, "--json")


def assert_one_clear_error(ended: Any, *, code: int, error: str, where: str | None = None) -> str:
    """Check exit code, error code and place; return the message."""
    assert ended.code == code, ended.err
    assert ended.json["status"] == "failed"
    told = ended.json["error"]
    assert told["code"] == error, told
    assert told["where"] == where
    place = f"{where}: " if where else ""
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error [")]
    assert line == f"error [{error}] {place}{told['message']}"
    assert "Traceback" not in ended.err + ended.out
    return str(told["message"])


def test_the_same_run_with_good_input_completes(cli: Any, tmp_path: Path) -> None:
    ended = train(cli, write(tmp_path / "rows.jsonl", ROWS))
    assert ended.code == 0, ended.err
    assert ended.json["state"]["registered_model"]["version"] == 1
    assert ended.json["state"]["eval_results"]["n"] >= 1
    assert {artifact["kind"] for artifact in ended.json["artifacts"]} >= {"weights", "report"}


def test_a_person_sees_accuracy_model_weights_and_report_at_the_end(cli: Any, home: Path, tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", ROWS)
    ended = cli("run", "supervised", "model=toy", f"dataset={name}", "eval_at_start=true", *NOOP, "--quiet")
    assert ended.code == 0
    facts = {line.split()[0]: line for line in ended.out.splitlines()[1:]}
    assert "before" in facts["accuracy"]
    assert "after (" in facts["accuracy"]
    assert "synthetic" in facts["accuracy"]
    assert facts["model"].split()[-1] == "supervised-toy-rows:1"
    assert Path(facts["weights"].split()[-1]).is_dir()
    assert Path(facts["report"].split()[-1]).is_file()
    assert f"--home {home}" in facts["look"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("learning_rte=1", "unknown config key 'learning_rte'"),
        ("batch_size=big", "config key 'batch_size'"),
        ("epochs=-1", "config key 'epochs'"),
        ("lr_schedule=zigzag", "config key 'lr_schedule'"),
        ("save_best=true", "need eval_every"),
    ],
)
def test_a_config_that_does_not_fit_exits_2(cli: Any, home: Path, given: str, told: str) -> None:
    ended = train(cli, "rows.jsonl", given)
    assert told in assert_one_clear_error(ended, code=2, error="config.invalid")
    assert not (home / "runs").exists()


def test_a_missing_config_key_says_what_it_is(cli: Any) -> None:
    ended = cli("run", "supervised", "dataset=sums", *NOOP, "--json")
    assert "'model' is missing" in assert_one_clear_error(ended, code=2, error="config.invalid")
    assert ended.json["error"]["hint"].startswith("model: ")


def test_a_dataset_that_does_not_exist(cli: Any) -> None:
    message = assert_one_clear_error(
        train(cli, "absent.jsonl"), code=1, error="not_found.dataset", where="supervised/load_dataset"
    )
    assert "absent.jsonl" in message


def test_an_empty_dataset(cli: Any, tmp_path: Path) -> None:
    ended = train(cli, write(tmp_path / "empty.jsonl", []))
    assert_one_clear_error(ended, code=1, error="data.empty", where="supervised/load_dataset")


def test_a_row_without_the_expected_fields_is_named_and_not_shown(cli: Any, tmp_path: Path) -> None:
    rows: list[object] = [*ROWS[:5], {"prompt": "secret words", "reply": "5"}]
    ended = train(cli, write(tmp_path / "rows.jsonl", rows), "holdout=0")
    message = assert_one_clear_error(ended, code=1, error="data.row", where="supervised/build_dataset")
    assert "row 5" in message
    assert "secret words" not in ended.out + ended.err


def test_a_sequence_that_is_too_long_is_cut_and_counted_or_refused(cli: Any, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "say much", "completion": "a" * 300}]
    name = write(tmp_path / "rows.jsonl", rows)
    given = ("holdout=0", "max_length=100")
    cut = train(cli, name, *given)
    assert cut.code == 0, cut.err
    assert cut.json["metrics"]["data.prepared.truncated"] == 1
    ended = train(cli, name, *given, "on_too_long=error")
    assert_one_clear_error(ended, code=1, error="data.too_long", where="supervised/build_dataset")


def test_an_adapter_that_lacks_a_capability_is_found_before_the_run(cli: Any, home: Path) -> None:
    lacking = '--adapter=training_client=noop,capabilities={"sampling": false}'
    ended = cli("run", "supervised", "model=toy", "dataset=sums", lacking, *NOOP[1:], "--json")
    assert ended.code == 2
    assert ended.json["error"]["code"] == "workflow.invalid"
    head, *problems = ended.err.splitlines()
    assert head == "error [workflow.invalid] workflow 'supervised' has 3 problems:"
    assert "supervised/evaluate: the training backend cannot sample" in problems[-1]
    assert not (home / "runs").exists()


def test_without_an_evaluator_the_result_is_absent(cli: Any, tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", ROWS)
    given = [option for option in NOOP if "evaluator" not in option]
    ended = cli("run", "supervised", "model=toy", f"dataset={name}", *given, "--adapter=evaluator=none", "--json")
    assert ended.code == 0
    assert "eval_results" not in ended.json["state"]


def test_a_model_directory_that_does_not_exist(cli: Any, tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", ROWS)
    ended = cli("run", "supervised", "model=./absent-model", f"dataset={name}", *NOOP[1:], "--json")
    message = assert_one_clear_error(ended, code=1, error="not_found.model", where="supervised/init_session")
    assert "absent-model" in message


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's own words on the numbers that are meant to overflow
def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_last_checkpoint(
    cli: Any, home: Path, tmp_path: Path
) -> None:
    name = write(tmp_path / "rows.jsonl", ROWS)
    given = ("learning_rate=1e308", "grad_clip_norm=0", "weight_decay=1e10", "batch_size=2", "save_every=1", "epochs=4")
    ended = train(cli, name, *given)
    assert ended.code == 1, ended.err
    assert ended.json["error"]["code"] == "training.non_finite_loss"
    assert "/train_step" in ended.json["error"]["where"]
    assert "the batch holds train/" in ended.json["error"]["message"]
    assert (home / "runs" / ended.json["run_id"] / "checkpoint-000001.npz").is_file()
