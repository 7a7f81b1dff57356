"""``runs``, ``show``, ``events``: what is kept of a run."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("flows")


def test_without_a_home_there_are_no_runs_and_none_is_made(cli: Any, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert cli("runs", "--home", absent, "--json").json == []
    assert cli("show", "x", "--home", absent).code == 2
    assert cli("events", "--home", absent).code == 2
    assert not absent.exists()


def test_runs_are_listed_newest_first_with_how_they_ended(cli: Any) -> None:
    first = cli("run", "flows.py:cook", "--json").json["run_id"]
    second = cli("run", "flows.py:spoil", "--json").json["run_id"]
    rows = cli("runs", "--json").json
    assert {row["run_id"]: row["status"] for row in rows} == {first: "completed", second: "failed"}
    assert [row["created_at"] for row in rows] == sorted((row["created_at"] for row in rows), reverse=True)
    assert rows[0]["error"]["code"] == "stage.failed"
    assert len(cli("runs", "--limit", 1, "--json").json) == 1
    assert second in cli("runs").out


def test_show_tells_what_a_run_gave_and_was_like_the_run_itself(cli: Any) -> None:
    ran = cli("run", "flows.py:cook", "size=3", "--json").json
    shown = cli("show", ran["run_id"], "--json").json
    assert {key: shown[key] for key in ran} == ran
    assert shown["config"]["size"] == 3
    assert shown["manifest"]["config_hash"]
    assert "cook" in cli("show", ran["run_id"]).out


def test_show_tells_why_a_run_failed(cli: Any) -> None:
    run_id = cli("run", "flows.py:spoil", "--json").json["run_id"]
    assert "[stage.failed] spoil/boil_over: RuntimeError: the stove is cold" in cli("show", run_id).out


def test_an_unknown_run_exits_2(cli: Any) -> None:
    ended = cli("show", "nothing", "--json")
    assert ended.code == 2
    assert ended.json["error"]["code"] == "not_found.run"


def test_events_are_those_of_the_newest_run_from_a_place_on(cli: Any) -> None:
    cli("run", "flows.py:spoil")
    run_id = cli("run", "flows.py:cook", "--json").json["run_id"]
    rows = cli("events", "--json").json
    assert {row["run_id"] for row in rows} == {run_id}
    assert [row["seq"] for row in rows] == [1, 2, 3, 4]
    assert [row["seq"] for row in cli("events", run_id, "--after", 2, "--json").json] == [3, 4]
    lines = cli("events").out.splitlines()
    assert len(lines) == 4
    assert "workflow.stop" in lines[-1]


def test_the_schema_lists_every_event_with_its_measurements(cli: Any) -> None:
    rows = {row["event"]: row for row in cli("events", "--schema", "--json").json}
    assert rows["training.step"]["measurements"] == ["loss", "lr", "tokens_per_sec", "grad_norm"]
    assert "training.step" in cli("events", "--schema").out
