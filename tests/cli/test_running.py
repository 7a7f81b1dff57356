"""``run`` and ``validate``: results, exit codes, what stands where."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("flows")


def test_a_run_prints_one_json_object_as_the_last_line_of_standard_output(cli: Any) -> None:
    ended = cli("run", "flows.py:cook", "--json")
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 1
    assert list(ended.json) == ["run_id", "status", "state", "metrics", "artifacts", "duration_s"]
    assert ended.json["status"] == "completed"
    assert ended.json["state"]["answer"]["size"] == 1
    assert "started" in ended.err, "progress goes to standard error"


def test_a_file_that_changed_within_a_second_is_read_anew(
    cli: Any, flows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for name in ("size", "note"):
        flows.write_text(flows.read_text("utf-8").replace('include={"size"', f'include={{"{name}"'), encoding="utf-8")
        os.utime(flows, (1e9, 1e9))
        answer = cli("run", "flows.py:cook", "--json").json["state"]["answer"]
        assert name in answer
    assert "size" not in answer


def test_without_json_a_person_reads_how_it_ended_and_how_to_look_again(cli: Any) -> None:
    ended = cli("run", "flows.py:cook", "--quiet")
    assert ended.code == 0
    assert ended.err == ""
    run_id = ended.out.split()[1]
    assert f"crucible-kitchen show {run_id} --home" in ended.out
    assert cli("show", run_id).code == 0


def test_a_failed_run_exits_1_and_tells_the_stage_on_both_channels(cli: Any) -> None:
    ended = cli("run", "flows.py:spoil", "--json")
    assert ended.code == 1
    assert ended.json["status"] == "failed"
    assert ended.json["run_id"]
    error = ended.json["error"]
    assert (error["code"], error["where"]) == ("stage.failed", "spoil/boil_over")
    assert set(error) == {"code", "message", "where", "hint"}
    assert "error [stage.failed] spoil/boil_over: RuntimeError: the stove is cold" in ended.err
    assert "Traceback" not in ended.err + ended.out


def test_debug_shows_the_traceback_of_the_cause(cli: Any) -> None:
    ended = cli("run", "flows.py:spoil", "--debug")
    assert "Traceback" in ended.err
    assert "in boil_over" in ended.err


@pytest.mark.parametrize("command", [("run", "flows.py:cook", "--dry-run"), ("validate", "flows.py:cook")])
def test_a_check_runs_nothing_and_leaves_nothing(cli: Any, home: Path, command: tuple[str, ...]) -> None:
    ended = cli(*command, "--json")
    assert ended.code == 0
    assert ended.json["status"] == "validated"
    assert list(home.iterdir()) == []
    assert "can run" in cli(*command).out


@pytest.mark.parametrize("command", [("run", "--dry-run"), ("validate",), ("run",)])
def test_a_misspelt_key_exits_2_and_the_nearest_key_is_named(cli: Any, home: Path, command: tuple[str, ...]) -> None:
    ended = cli(*command, "flows.py:cook", "siz=3", "--json")
    assert ended.code == 2
    assert ended.json == {
        "run_id": None,
        "status": "failed",
        "error": {
            "code": "config.invalid",
            "message": "unknown config key 'siz'",
            "where": None,
            "hint": "did you mean 'size'?",
        },
    }
    assert ended.err.splitlines() == ["error [config.invalid] unknown config key 'siz'", "hint: did you mean 'size'?"]
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("size=7", "size", 7),
        ("note=null", "note", None),
        ("note=a=b c", "note", "a=b c"),
        ("note={{ jinja }}", "note", "{{ jinja }}"),
        ('names=["a","b"]', "names", ["a", "b"]),
        ("names=a, b", "names", ["a", "b"]),
        ('options={"salt": "2"}', "options", {"salt": "2"}),
        ("options.salt=2", "options", {"salt": "2"}),
    ],
)
def test_values_become_what_the_config_says_they_are(cli: Any, given: str, key: str, value: object) -> None:
    assert cli("run", "flows.py:cook", given, "--json").json["state"]["answer"][key] == value


def test_a_recipe_gives_defaults_and_a_key_on_the_line_wins(cli: Any) -> None:
    assert cli("run", "flows.py:dinner", "--json").json["state"]["answer"]["size"] == 4
    assert cli("run", "flows.py:dinner", "size=5", "--json").json["state"]["answer"]["size"] == 5


def test_a_workflow_can_be_given_as_a_module_below_the_current_directory(cli: Any) -> None:
    assert cli("run", "flows:cook", "--json").code == 0


@pytest.mark.parametrize(
    ("name", "text"), [("pot.toml", 'size = 2\n[options]\nsalt = "1"\n'), ("pot.json", '{"size": 2}')]
)
def test_a_config_file_gives_values_and_the_line_wins_over_it(cli: Any, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert cli("run", "flows.py:cook", "--config", name, "--json").json["state"]["answer"]["size"] == 2
    given = cli("run", "flows.py:cook", "--config", name, "size=9", "options.pepper=3", "--json").json["state"][
        "answer"
    ]
    assert given["size"] == 9
    assert given["options"]["pepper"] == "3"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "nothing"), "there is no workflow or recipe 'nothing'"),
        (("run", "flows.py:nothing"), "there is no workflow or recipe 'nothing' in flows.py"),
        (("run", "flows.py:a_number"), "there is no workflow or recipe 'a_number' in flows.py"),
        (("run", "absent.py:cook"), "there is no file absent.py"),
        (("run", "absent_module:cook"), "cannot import absent_module"),
        (("run", "broken.py:cook"), "broken.py cannot be imported: NameError"),
        (("run", "flows.py:cook", "size"), "'size' is not KEY=VALUE"),
        (("run", "flows.py:cook", "size=1", "size=2"), "'size' is given twice"),
        (("run", "flows.py:cook", "size=big"), "config key 'size'"),
        (("run", "flows.py:cook", "note=env:TOKEN"), "takes no secret"),
        (("run", "flows.py:cook", "--config", "absent.toml"), "cannot read absent.toml"),
        (("run", "flows.py:cook", "--config", "flows.py"), "neither a .toml nor a .json"),
        (("run", "flows.py:cook", "--config", "broken.toml"), "is not valid TOML"),
        (("run", "flows.py:cook", "--config", "list.json"), "holds no object"),
        (("run", "flows.py:cook", "--adapter", "evaluator"), "is not PORT=NAME"),
        (("run", "flows.py:cook", "--adapter", "oven=noop"), "there is no port 'oven'"),
        (("run", "flows.py:cook", "--adapter", "evaluator=nop"), "has no adapter 'nop'"),
        (("run", "flows.py:cook", "--jsonl", "/proc/none/events"), "cannot write /proc/none/events"),
        (("run", "flows.py:unwritten"), "reads 'answer', which no stage before it writes"),
        (("run", "flows.py:cook", "--oven"), "No such option"),
        (("run",), "Missing argument"),
        (("cook",), "No such command"),
        (("show",), "Missing argument"),
    ],
)
def test_bad_usage_is_one_clear_error_and_exit_code_2(
    cli: Any, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    (tmp_path / "broken.py").write_text("import crucible_kitchen\ncook = stir()\n", encoding="utf-8")
    (tmp_path / "broken.toml").write_text("size = = 1\n", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    ended = cli(*arguments, "--json")
    assert ended.code == 2
    assert told in ended.json["error"]["message"]
    lines = ended.err.splitlines()
    assert lines[0].startswith(f"error [{ended.json['error']['code']}] ")
    assert all(line.startswith("hint: ") for line in lines[1:])


def test_several_problems_stand_one_in_a_line(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        "from crucible_kitchen import Workflow, stage\n"
        "@stage()\nasync def one(a: int) -> None: ...\n"
        "@stage()\nasync def two(b: int) -> None: ...\n"
        "flow = Workflow('flow', one, two)\n",
        encoding="utf-8",
    )
    lines = cli("validate", "two.py:flow").err.splitlines()
    assert lines[0] == "error [workflow.invalid] workflow 'flow' has 2 problems:"
    assert [line[:14] for line in lines[1:]] == ["  - flow/one: ", "  - flow/two: "]


def test_events_go_to_a_file_as_lines_of_json(cli: Any, tmp_path: Path) -> None:
    run_id = cli("run", "flows.py:cook", "--jsonl", "logs/events.jsonl", "--json").json["run_id"]
    rows = [json.loads(line) for line in (tmp_path / "logs/events.jsonl").read_text().splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    assert {row["run_id"] for row in rows} == {run_id}
    assert rows[-1]["event"] == "workflow.stop"


def test_metrics_are_served_during_a_run_and_the_port_is_told(cli: Any) -> None:
    ended = cli("run", "flows.py:cook", "--metrics-port", "0")
    assert ended.code == 0
    assert "metrics are served on port" in ended.err


def test_a_home_that_cannot_be_written_is_one_clear_error(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    ended = cli("run", "flows.py:cook", "--home", "file", "--json")
    assert ended.code == 1
    assert ended.json["error"]["code"] == "store.full"
    assert "Traceback" not in ended.err
