"""``verify``: a run executed again from its manifest, and the three ways in which that ends."""

from pathlib import Path
from typing import Any

import pytest

NOOP = [
    "--adapter=training_client=noop",
    "--adapter=dataset_store=noop",
    "--adapter=evaluator=noop",
    "--adapter=model_registry=noop",
    "--adapter=blob_store=noop",
]
SMALL = ["model=noop", "dataset=noop", "dataset_size=40", "batch_size=16", "eval_size=8", "eval_max_tokens=4"]


@pytest.fixture
def done(cli: Any) -> str:
    ended = cli("run", "supervised", *SMALL, *NOOP, "--json")
    assert ended.code == 0, ended.err
    run_id: str = ended.json["run_id"]
    return run_id


def test_a_reproducible_run_gives_the_same_bits_again_and_leaves_nothing(cli: Any, home: Path, done: str) -> None:
    before = sorted(path.name for path in (home / "runs").iterdir())
    ended = cli("verify", done, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["same"] is True
    assert ended.json["same_weights"] is True
    assert "the same, bit for bit" in ended.out
    assert sorted(path.name for path in (home / "runs").iterdir()) == before


def test_a_run_whose_result_was_another_is_told_with_where_it_differs(cli: Any, home: Path, done: str) -> None:
    import sqlite3

    with sqlite3.connect(home / "runs.db") as db:
        db.execute("UPDATE artifacts SET sha256 = 'f00' WHERE kind = 'weights'")
    db.close()
    ended = cli("verify", done)
    assert ended.code == 1
    assert "NOT the same" in ended.out
    assert "weights  differ" in ended.out


@pytest.mark.usefixtures("flows")
def test_a_run_that_did_not_complete_is_refused(cli: Any) -> None:
    failed = cli("run", "flows.py:spoil", "--json")
    ended = cli("verify", failed.json["run_id"])
    assert ended.code == 2
    assert "run.not_reproducible" in ended.err


def test_a_run_of_other_code_is_refused_by_name(cli: Any, flows: Path) -> None:
    done = cli("run", "flows.py:cook", "--json")
    flows.write_text(
        flows.read_text().replace('config.model_dump(include={"size"', 'config.model_dump(include={"note"')
    )
    ended = cli("verify", done.json["run_id"])
    assert ended.code == 2
    assert "run.changed" in ended.err
    assert "code was" in ended.err


def test_a_reinforcement_run_in_turn_is_the_same_bit_for_bit_and_an_overlapping_one_is_not_tried(cli: Any) -> None:
    rl = (
        "reinforcement",
        "model=tiny",
        "lora_rank=0",
        "env=sums",
        "num_rollouts=3",
        "groups_per_batch=2",
        "eval_size=2",
    )
    rl = (*rl, "advantage=grpo", "sampling=deterministic", "--adapter", "training_client=noop", "--json")
    ended = cli("run", *rl)
    assert ended.code == 0, ended.err
    again = cli("verify", ended.json["run_id"], "--json")
    assert again.code == 0, again.err
    assert again.json["same"] is True
    overlapping = cli("run", *rl, "max_staleness=1")
    refused = cli("verify", overlapping.json["run_id"])
    assert refused.code == 2
    assert "max_staleness=1" in refused.err
