"""``models``: the registered versions and what they came from."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen_sqlite import SqliteModelRegistry


@pytest.fixture
def registered(home: Path) -> None:
    """Two versions of a model; the second grew out of the first and is the best."""

    async def register() -> None:
        registry = SqliteModelRegistry(home)
        lineage: dict[str, Any] = {"run": "run-1", "recipe": "supervised", "seed": 0}
        await registry.register("adder", "blob://a", lineage=lineage, metrics={"accuracy": 0.5}, idempotency_key="1")
        lineage |= {"run": "run-2", "parent_model": "adder:1"}
        await registry.register("adder", "blob://b", lineage=lineage, metrics={"accuracy": 0.9}, idempotency_key="2")
        await registry.set_alias("adder", "best", 2, expected=None)
        await registry.aclose()

    anyio.run(register)


@pytest.mark.usefixtures("registered")
def test_models_are_listed_newest_first_with_their_accuracy(cli: Any) -> None:
    rows = cli("models", "--json").json
    assert [(row["id"], row["accuracy"], row["run"]) for row in rows] == [
        ("adder:2", 0.9, "run-2"),
        ("adder:1", 0.5, "run-1"),
    ]
    shown = cli("models").out.splitlines()
    assert [line.split()[:4] for line in shown[1:]] == [
        ["adder", "2", "candidate", "0.900"],
        ["adder", "1", "candidate", "0.500"],
    ]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["adder:2", "adder:best", "adder"])
def test_a_model_is_shown_with_its_lineage_by_number_alias_or_as_the_newest(cli: Any, name: str) -> None:
    shown = cli("models", "show", name, "--json").json
    assert shown["id"] == "adder:2"
    assert shown["lineage"]["run"] == "run-2"
    assert [ancestor["id"] for ancestor in shown["ancestors"]] == ["adder:1"]
    text = cli("models", "show", name).out
    assert "parent adder:1 (run run-1)" in text
    assert "blob://b" in text


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["adder:3", "adder:worst", "baker", "baker:1"])
def test_an_unknown_version_exits_2(cli: Any, name: str) -> None:
    ended = cli("models", "show", name, "--json")
    assert ended.code == 2
    assert ended.json["error"]["code"] == "not_found.version"


def test_without_a_home_there_are_no_models_and_none_is_made(cli: Any, tmp_path: Path) -> None:
    assert cli("models", "--home", tmp_path / "absent", "--json").json == []
    assert not (tmp_path / "absent").exists()


def test_another_registry_can_be_asked(cli: Any) -> None:
    assert cli("models", "--adapter", "model_registry=noop", "--json").json == []
    assert cli("models", "--adapter", "evaluator=noop").code == 2
