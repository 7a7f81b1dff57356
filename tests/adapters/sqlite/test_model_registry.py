"""The SQLite registry: its port's contract, and what only a shared file has to keep: races of real processes."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from crucible_kitchen.errors import ConfigError, StoreError, VersionNotFound
from crucible_kitchen.ports import ModelRegistry
from crucible_kitchen.testing import contracts
from crucible_kitchen_sqlite import SqliteModelRegistry

pytestmark = pytest.mark.anyio

URI = "blob://sha256/" + "a" * 64


@pytest.fixture
async def registry(home: Path) -> AsyncIterator[SqliteModelRegistry]:
    registry = SqliteModelRegistry(home)
    yield registry
    await registry.aclose()


@pytest.mark.parametrize("check", contracts.MODEL_REGISTRY, ids=contracts.name)
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_it_keeps_the_contract(check, registry: SqliteModelRegistry) -> None:
    assert isinstance(registry, ModelRegistry)
    await check(contracts.ModelRegistryCase(registry))


async def test_building_it_touches_no_file(home: Path) -> None:
    registry = SqliteModelRegistry(home / "later")
    assert not await anyio.Path(home / "later").exists()
    await registry.aclose()
    await registry.aclose()


async def test_versions_outlive_the_registry(home: Path) -> None:
    one = SqliteModelRegistry(home)
    version = await one.register("m", URI, lineage={"seed": 1}, metrics={}, idempotency_key="k")
    await one.set_alias("m", "live", 1, expected=None)
    await one.aclose()
    two = SqliteModelRegistry(home)
    assert await two.get("m", "live") == version
    assert await two.get("m", "1") == version
    await two.aclose()
    with pytest.raises(StoreError):
        await two.get("m", 1)


async def test_deleting_takes_the_aliases_along(registry: SqliteModelRegistry) -> None:
    await registry.register("m", URI, lineage={}, metrics={}, idempotency_key="k")
    await registry.set_alias("m", "live", 1, expected=None)
    await registry.delete("m", 1)
    with pytest.raises(VersionNotFound):
        await registry.get("m", "live")


async def test_a_lineage_that_bites_its_tail_ends(registry: SqliteModelRegistry) -> None:
    await registry.register("m", URI, lineage={"parent_model": "m:2"}, metrics={}, idempotency_key="a")
    await registry.register("m", URI, lineage={"parent_model": "m:1"}, metrics={}, idempotency_key="b")
    assert [v.id for v in await registry.lineage("m", 1)] == ["m:1", "m:2"]


async def test_names_that_could_not_be_read_back_are_refused(registry: SqliteModelRegistry) -> None:
    with pytest.raises(ConfigError):
        await registry.register("a:b", URI, lineage={}, metrics={}, idempotency_key="k")
    await registry.register("m", URI, lineage={}, metrics={}, idempotency_key="k")
    with pytest.raises(ConfigError):
        await registry.set_alias("m", "7", 1, expected=None)
    with pytest.raises(ConfigError, match="no stage"):
        await registry.set_stage("m", 1, "live")
    with pytest.raises(ConfigError, match="lineage"):
        await registry.register("m", URI, lineage={"x": object()}, metrics={}, idempotency_key="j")


async def test_a_file_of_a_newer_version_is_refused(home: Path) -> None:
    with sqlite3.connect(home / "registry.db") as connection:
        connection.execute("PRAGMA user_version=7")
    connection.close()
    registry = SqliteModelRegistry(home)
    with pytest.raises(StoreError, match="version 7"):
        await registry.versions()
    await registry.aclose()


async def test_a_file_that_is_no_database_is_refused(home: Path) -> None:
    (home / "registry.db").write_bytes(b"not a database, but long enough to be one " * 40)
    registry = SqliteModelRegistry(home)
    with pytest.raises(StoreError):
        await registry.versions()
    await registry.aclose()


RACER = """
import json, sys, anyio
from pathlib import Path
from crucible_kitchen.errors import Conflict
from crucible_kitchen_sqlite import SqliteModelRegistry

async def main():
    home, me = Path(sys.argv[1]), sys.argv[2]
    registry = SqliteModelRegistry(home)
    sys.stdin.readline()
    numbers, shared, moved = [], [], 0
    for i in range(15):
        version = await registry.register("m", "u", lineage={}, metrics={}, idempotency_key=f"{me}/{i}")
        numbers.append(version.version)
        both = await registry.register("shared", "u", lineage={"by": me}, metrics={}, idempotency_key=f"both/{i}")
        shared.append([both.version, both.lineage["by"]])
        try:
            await registry.set_alias("m", f"live{i}", version.version, expected=None)
            moved += 1
        except Conflict:
            pass
    print(json.dumps([numbers, shared, moved]))
    await registry.aclose()

anyio.run(main)
"""


def race(home: Path, processes: int) -> list[tuple[list[int], list[list[object]], int]]:
    command = [sys.executable, "-c", RACER, str(home)]
    racers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    for racer in racers:  # all are ready when they read this line, more or less; the rest is the file's lock
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    return [tuple(json.loads(racer.communicate(timeout=60)[0])) for racer in racers]


async def test_processes_that_race_get_numbers_without_gaps_and_one_winner_each(home: Path) -> None:
    results = await anyio.to_thread.run_sync(race, home, 3)
    numbers = [number for mine, _, _ in results for number in mine]
    assert sorted(numbers) == list(range(1, 46))
    assert all(mine == sorted(mine) for mine, _, _ in results)
    answers = [shared for _, shared, _ in results]
    assert answers[0] == answers[1] == answers[2]
    assert [number for number, _ in answers[0]] == list(range(1, 16))
    assert sum(moved for _, _, moved in results) == 15
