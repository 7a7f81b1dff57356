"""The commands on registered models: ``models`` and ``models show``.

They ask the registry's adapter and change nothing. Read next: ``crucible_kitchen.ports.model_registry``.
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from crucible_kitchen.cli.console import answer, answer_json, block, reporting, table
from crucible_kitchen.cli.options import DEFAULT_HOME, HomeOption, JsonOption
from crucible_kitchen.cli.summary import clock
from crucible_kitchen.errors import AdapterError, VersionNotFound

if TYPE_CHECKING:
    from crucible_kitchen.ports import ModelRegistry
    from crucible_kitchen.types import ModelVersion

__all__ = ["models"]

T = TypeVar("T")

RegistryOption = Annotated[
    str,
    typer.Option("--adapter", metavar="model_registry=NAME[,KEY=VALUE...]", help="The registry to ask."),
]
DEFAULT_REGISTRY = "model_registry=sqlite"

models = typer.Typer(help="List the registered models.", invoke_without_command=True)


@models.callback()
@reporting
def list_models(
    context: typer.Context,
    home: HomeOption = DEFAULT_HOME,
    adapter: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """List the registered models, the newest first; `models show NAME:VERSION` shows one with its lineage."""
    if context.invoked_subcommand is not None:
        return
    found = [_row(version) for version in reversed(_ask(home, adapter, lambda registry: registry.versions()))]
    if as_json:
        answer_json(found)
        return
    rows = [
        (
            row["name"],
            row["version"],
            row["stage"],
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
            clock(row["created_at"]),
            row["run"],
            "synthetic" if row["synthetic"] else "",
        )
        for row in found
    ]
    table(("name", "version", "stage", "accuracy", "registered", "run", ""), rows)


@models.command("show")
@reporting
def show_model(
    model: Annotated[
        str,
        typer.Argument(metavar="NAME:VERSION", help="A version by number or alias; NAME alone is its newest version."),
    ],
    home: HomeOption = DEFAULT_HOME,
    adapter: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show a model version: what it came from, what was measured on it."""

    async def ask(registry: "ModelRegistry") -> "list[ModelVersion]":
        name, _, version = model.partition(":")
        if not version:
            versions = await registry.versions(name)
            if not versions:
                raise VersionNotFound(f"there is no model {name!r}", hint="list them with `crucible-kitchen models`")
            version = str(versions[-1].version)
        return list(await registry.lineage(name, int(version) if version.isdigit() else version))

    found, *ancestors = _ask(home, adapter, ask)
    if as_json:
        answer_json(_row(found) | asdict(found) | {"ancestors": [_row(ancestor) for ancestor in ancestors]})
        return
    facts = {"stage": found.stage, "registered": clock(found.created_at), "weights": found.uri}
    if found.synthetic:
        facts["synthetic"] = "yes: made by a noop adapter"
    block(found.id, facts.items())
    block("lineage", ((key, value) for key, value in found.lineage.items() if value is not None))
    block("metrics", ((key, value) for key, value in found.metrics.items() if isinstance(value, float)))
    for ancestor in ancestors:
        answer(f"parent {ancestor.id} (run {ancestor.lineage.get('run', 'unknown')})")


def _row(version: "ModelVersion") -> dict[str, Any]:
    return {
        "id": version.id,
        "name": version.name,
        "version": version.version,
        "stage": version.stage,
        "accuracy": version.metrics.get("accuracy"),
        "created_at": version.created_at,
        "run": version.lineage.get("run"),
        "uri": version.uri,
        "synthetic": version.synthetic,
    }


def _ask(home: Path, given: str, question: "Callable[[ModelRegistry], Awaitable[T]]") -> T:
    """Build the registry's adapter, ask it, and close it."""
    import anyio

    from crucible_kitchen.cli.given import adapters
    from crucible_kitchen.registry import Registry

    if given == DEFAULT_REGISTRY and not home.exists():
        given = "model_registry=noop"  # an empty one: the real one would make a home by being asked
    known = Registry.discover()
    ((port, choice),) = adapters(known, [given]).items()
    if port != "model_registry" or choice is None:
        raise AdapterError(f"{given!r} is no model registry", hint="for instance --adapter model_registry=sqlite")
    name, options = choice if isinstance(choice, tuple) else (choice, {})
    registry: ModelRegistry = known.build_adapter(port, name, options, home.absolute())

    async def asked() -> T:
        try:
            return await question(registry)
        finally:
            await registry.aclose()

    return anyio.run(asked)
