"""``describe``, the lists, ``doctor``, ``version``: what there is."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen import __version__
from crucible_kitchen.cli import doctor


def test_describe_shows_a_workflow_with_its_stages_and_config_keys(cli: Any) -> None:
    shown = cli("describe", "supervised").out
    assert "for epoch in epochs" in shown
    assert "train_step(" in shown
    assert "learning_rate" in shown
    described = cli("describe", "supervised", "--json").json
    keys = {row["key"]: row for row in described["config"]}
    assert keys["model"]["required"]
    assert keys["epochs"]["default"] == 1
    assert keys["epochs"]["doc"]
    assert "supervised/epoch/batch/train_step" in [stage["path"] for stage in described["stages"]]


def test_describe_draws_a_workflow_as_a_flowchart(cli: Any) -> None:
    assert cli("describe", "supervised", "--mermaid").out.startswith("flowchart TD")


def test_describe_shows_a_recipe_with_its_own_defaults(cli: Any) -> None:
    assert cli("describe", "sums_demo").out.startswith("recipe sums_demo: ")
    keys = {row["key"]: row for row in cli("describe", "sums_demo", "--json").json["config"]}
    assert keys["model"] == keys["model"] | {"required": False, "default": "tiny"}


@pytest.mark.parametrize("name", ["train_step", "supervised/epoch/batch/train_step"])
def test_describe_shows_a_stage_by_its_name_or_path(cli: Any, name: str) -> None:
    described = cli("describe", name, "--json").json
    assert described["name"] == "train_step"
    assert "session" in described["reads"]
    assert "step" in described["writes"]
    assert "reads   session" in cli("describe", name).out


def test_describe_reads_a_file_of_the_users(cli: Any, flows: Path) -> None:
    assert "answer(" in cli("describe", f"{flows.name}:cook").out
    keys = {row["key"]: row["default"] for row in cli("describe", f"{flows.name}:dinner", "--json").json["config"]}
    assert keys["size"] == 4


def test_describe_of_an_unknown_name_names_the_nearest(cli: Any) -> None:
    ended = cli("describe", "train_stp")
    assert ended.code == 2
    assert "did you mean 'train_step'?" in ended.err


def test_workflows_and_recipes_are_listed(cli: Any) -> None:
    flows = {row["name"]: row for row in cli("workflows", "--json").json}
    assert "training_client" in flows["supervised"]["ports"]
    assert "learning_rate" in flows["supervised"]["config"]
    recipes = {row["name"]: row for row in cli("recipes", "--json").json}
    assert recipes["sums_demo"]["workflow"] == "supervised"
    assert "supervised" in cli("workflows").out
    assert "sums_demo" in cli("recipes").out


def test_adapters_are_listed_with_the_defaults_first_in_their_port(cli: Any) -> None:
    rows = cli("adapters", "--json").json
    assert {(row["port"], row["name"]) for row in rows if row["default"]} >= {
        ("training_client", "torch"),
        ("dataset_store", "files"),
    }
    assert [row for row in rows if not row["usable"]] == []
    assert "training_client" in cli("adapters").out


def test_doctor_finds_the_embedded_defaults_ready(cli: Any, home: Path) -> None:
    ended = cli("doctor", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert found["ok"]
    assert found["version"] == __version__
    assert found["torch"]["threads"] >= 1
    assert found["home"]["path"] == str(home)
    assert {row["extra"] for row in found["extras"]} >= {"torch", "data"}


def test_doctor_names_the_line_that_installs_what_is_missing(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "torch" else find(name))
    ended = cli("doctor", "--json")
    assert ended.code == 1
    assert ended.json["torch"] is None
    (row,) = [row for row in ended.json["adapters"] if row["name"] == "torch"]
    assert not row["usable"]
    assert row["install"] == "pip install 'crucible-kitchen[torch]'"
    shown = cli("doctor").out
    assert "problem: the default adapter training_client.torch cannot be used" in shown
    assert "pip install 'crucible-kitchen[torch]'" in shown


@pytest.mark.parametrize("place", ["/proc/none", "file", "file/home"])
def test_doctor_finds_a_home_that_cannot_be_written(cli: Any, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    ended = cli("doctor", "--home", place, "--json")
    assert ended.code == 1
    assert "cannot be written" in ended.json["home"]["problem"]


def test_the_version_is_told_with_those_of_the_packages(cli: Any) -> None:
    assert cli("--version").out == f"crucible-kitchen {__version__}\n"
    versions = cli("version", "--json").json
    assert versions["crucible-kitchen"] == __version__
    assert "numpy" in cli("version").out
