"""The contract of port ``model_registry``: numbers without gaps, aliases by compare-and-set, lineage.

Knows no adapter. Read next: ``crucible_kitchen.ports.model_registry``.
"""

from dataclasses import dataclass
from typing import Any

import anyio

from crucible_kitchen.errors import Conflict, VersionNotFound
from crucible_kitchen.ports import ModelRegistry
from crucible_kitchen.testing.contracts.base import Suite, refuses
from crucible_kitchen.types import ModelVersion

__all__ = ["MODEL_REGISTRY", "ModelRegistryCase"]


@dataclass(frozen=True)
class ModelRegistryCase:
    """A registry under test; it is empty."""

    registry: ModelRegistry

    @property
    def adapter(self) -> ModelRegistry:
        """The registry."""
        return self.registry

    async def register(self, name: str = "model", key: str = "key", **options: Any) -> ModelVersion:
        """Register a version."""
        values: dict[str, Any] = {"lineage": {"run": "r1", "seed": 7}, "metrics": {"accuracy": 0.5}} | options
        return await self.registry.register(name, "blob://sha256/" + "a" * 64, idempotency_key=key, **values)


MODEL_REGISTRY: Suite[ModelRegistryCase] = Suite("model_registry")


@MODEL_REGISTRY
async def a_version_keeps_what_it_was_registered_with(case: ModelRegistryCase) -> None:
    """Address, lineage, metrics; it begins as a candidate."""
    version = await case.register(lineage={"run": "r1", "nested": {"a": [1, None]}}, metrics={"f1": 0.25})
    found = await case.registry.get("model", 1)
    assert (found.name, found.version, found.uri) == ("model", 1, version.uri), f"found {found.id}, {found.uri}"
    assert dict(found.lineage) == {"run": "r1", "nested": {"a": [1, None]}}, f"lineage {found.lineage}"
    assert dict(found.metrics) == {"f1": 0.25}, "metrics or stage are others"
    assert found.stage == "candidate", "metrics or stage are others"
    assert found.created_at > 0, "time or synthetic is wrong"
    assert not found.synthetic, "time or synthetic is wrong"


@MODEL_REGISTRY
async def versions_count_from_one_in_each_name(case: ModelRegistryCase) -> None:
    """And are listed oldest first."""
    for number in range(3):
        await case.register("one", f"one{number}")
    await case.register("two", "two")
    assert [v.version for v in await case.registry.versions("one")] == [1, 2, 3], "versions of one name"
    assert [v.id for v in await case.registry.versions()] == ["one:1", "one:2", "one:3", "two:1"], "all versions"
    assert await case.registry.versions("three") == [], "a name without versions"


@MODEL_REGISTRY
async def versions_have_no_gaps_under_concurrency(case: ModelRegistryCase) -> None:
    """Twenty at once get the numbers 1 to 20."""
    numbers: list[int] = []

    async def register(number: int) -> None:
        numbers.append((await case.register("model", f"key{number}")).version)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(register, number)
    assert sorted(numbers) == list(range(1, 21)), f"versions {sorted(numbers)}"


@MODEL_REGISTRY
async def the_same_key_gives_the_first_answer(case: ModelRegistryCase) -> None:
    """A registration that is repeated after a crash makes no second version, also when repeated at once."""
    first = await case.register(key="run1/register")
    again = await case.register(key="run1/register", metrics={"accuracy": 0.9})
    assert (again.id, dict(again.metrics)) == (first.id, {"accuracy": 0.5}), f"the second answer is {again.id}"
    ids: list[str] = []

    async def register() -> None:
        ids.append((await case.register(key="run2/register")).id)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(register)
    assert set(ids) == {"model:2"}, f"one key made {sorted(set(ids))}"
    assert len(await case.registry.versions("model")) == 2, "one key made several versions"


@MODEL_REGISTRY
async def an_alias_moves_only_by_compare_and_set(case: ModelRegistryCase) -> None:
    """It must point at what the caller believes."""
    await case.register(key="a")
    await case.register(key="b")
    registry = case.registry
    await registry.set_alias("model", "live", 1, expected=None)
    assert (await registry.get("model", "live")).version == 1, "the alias points elsewhere"
    for expected in (None, 2):
        with refuses(Conflict, what=f"moving an alias from {expected} that points at 1"):
            await registry.set_alias("model", "live", 2, expected=expected)
    assert (await registry.get("model", "live")).version == 1, "a refused move moved the alias"
    await registry.set_alias("model", "live", 2, expected=1)
    assert (await registry.get("model", "live")).version == 2, "the alias did not move"
    with refuses(Conflict, what="expecting an alias that does not exist"):
        await registry.set_alias("model", "other", 1, expected=1)
    with refuses(VersionNotFound, what="pointing an alias at no version"):
        await registry.set_alias("model", "live", 9, expected=2)


@MODEL_REGISTRY
async def one_of_many_movers_wins(case: ModelRegistryCase) -> None:
    """Of movers with the same belief exactly one succeeds."""
    for number in range(5):
        await case.register(key=str(number))
    won: list[int] = []

    async def move(version: int) -> None:
        try:
            await case.registry.set_alias("model", "live", version, expected=None)
        except Conflict:
            return
        won.append(version)

    async with anyio.create_task_group() as group:
        for version in range(1, 6):
            group.start_soon(move, version)
    assert len(won) == 1, f"{len(won)} movers won"
    assert (await case.registry.get("model", "live")).version == won[0], "the alias is not the winner's"


@MODEL_REGISTRY
async def what_is_not_registered_is_not_found(case: ModelRegistryCase) -> None:
    """By number, by alias, by name, in every method."""
    await case.register()
    for name, version in (("model", 2), ("model", "live"), ("other", 1)):
        with refuses(VersionNotFound, what=f"getting {name}:{version}"):
            await case.registry.get(name, version)
        with refuses(VersionNotFound, what=f"the lineage of {name}:{version}"):
            await case.registry.lineage(name, version)
    with refuses(VersionNotFound, what="the stage of a version that does not exist"):
        await case.registry.set_stage("model", 2, "archived")


@MODEL_REGISTRY
async def a_version_moves_between_stages(case: ModelRegistryCase) -> None:
    """And says so when it is read again."""
    await case.register()
    for stage in ("staging", "production", "archived", "candidate"):
        moved = await case.registry.set_stage("model", 1, stage)
        assert moved.stage == stage == (await case.registry.get("model", 1)).stage, f"stage {moved.stage}"


@MODEL_REGISTRY
async def a_synthetic_version_is_not_promoted(case: ModelRegistryCase) -> None:
    """It may be archived."""
    version = await case.register(synthetic=True)
    assert version.synthetic, "the mark is lost"
    assert (await case.registry.get("model", 1)).synthetic, "the mark is lost"
    for stage in ("staging", "production"):
        with refuses(Conflict, what=f"promoting a synthetic version to {stage}"):
            await case.registry.set_stage("model", 1, stage)
    assert (await case.registry.get("model", 1)).stage == "candidate", "a refused promotion promoted"
    await case.registry.set_stage("model", 1, "archived")


@MODEL_REGISTRY
async def lineage_goes_back_through_the_parents(case: ModelRegistryCase) -> None:
    """Nearest first; it ends at a parent that is not registered."""
    await case.register("base", "b", lineage={"parent_model": "elsewhere:3"})
    await case.register("middle", "m", lineage={"parent_model": "base:1"})
    await case.register("middle", "n", lineage={"parent_model": "base:1"})
    await case.register("tip", "t", lineage={"parent_model": "middle:2"})
    chain = await case.registry.lineage("tip", 1)
    assert [v.id for v in chain] == ["tip:1", "middle:2", "base:1"], f"lineage {[v.id for v in chain]}"


@MODEL_REGISTRY
async def a_removed_version_leaves_its_number_unused(case: ModelRegistryCase) -> None:
    """Removing twice is harmless."""
    await case.register(key="a")
    await case.register(key="b")
    await case.registry.delete("model", 2)
    await case.registry.delete("model", 2)
    with refuses(VersionNotFound, what="getting a removed version"):
        await case.registry.get("model", 2)
    assert (await case.register(key="c")).version == 3, "the number of a removed version was used again"
    assert [v.version for v in await case.registry.versions("model")] == [1, 3], "other versions"
