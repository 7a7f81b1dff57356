"""The commands that say what there is: ``workflows``, ``recipes``, ``adapters``, ``describe``.

They import what is installed and run nothing. Read next: ``crucible_kitchen.workflow.describe``.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crucible_kitchen.cli.console import answer, answer_json, plain, reporting, table
from crucible_kitchen.cli.options import JsonOption
from crucible_kitchen.errors import CrucibleError, NotFoundError

if TYPE_CHECKING:
    from crucible_kitchen.config import RunConfig
    from crucible_kitchen.registry import Registry
    from crucible_kitchen.workflow.nodes import Workflow
    from crucible_kitchen.workflow.recipe import Recipe
    from crucible_kitchen.workflow.stage import Step

__all__ = ["adapters", "describe", "environments", "recipes", "workflows"]


@reporting
def workflows(as_json: JsonOption = False) -> None:
    """List the workflows: how training can run."""
    from crucible_kitchen.registry import Registry

    registry = Registry.discover()
    found = [_guarded(registry, name, _workflow_row) for name in registry.workflows]
    if as_json:
        answer_json(found)
    else:
        table(("workflow", "what"), [(row["name"], row["description"]) for row in found])


@reporting
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes: workflows with vetted settings."""
    from crucible_kitchen.registry import Registry

    registry = Registry.discover()
    found = [_guarded(registry, name, _recipe_row) for name in registry.recipes]
    if as_json:
        answer_json(found)
    else:
        rows = [(row["name"], row.get("workflow"), row["description"]) for row in found]
        table(("recipe", "workflow", "what"), rows)


def _guarded(registry: "Registry", name: str, row: Callable[[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Return a row; one that cannot be loaded says so and spoils no other."""
    from crucible_kitchen.cli.given import target

    try:
        return row(name, target(registry, name))
    except CrucibleError as error:
        return {"name": name, "description": f"cannot be loaded: {error}"}


def _workflow_row(name: str, workflow: "Workflow") -> dict[str, Any]:
    from crucible_kitchen.workflow.check import ports_of

    return {
        "name": name,
        "description": workflow.description,
        "ports": sorted(ports_of(workflow)),
        "config": list(workflow.config.model_fields),
    }


def _recipe_row(name: str, recipe: "Recipe") -> dict[str, Any]:
    return {
        "name": name,
        "workflow": recipe.workflow.name,
        "description": recipe.description,
        "defaults": dict(recipe.defaults),
        "adapters": dict(recipe.adapters),
    }


@reporting
def adapters(as_json: JsonOption = False) -> None:
    """List the adapters, and whether they can be used."""
    from crucible_kitchen.cli.doctor import adapter_rows
    from crucible_kitchen.registry import Registry

    found = adapter_rows(Registry.discover())
    if as_json:
        answer_json(found)
        return
    rows = [
        (
            row["port"],
            row["name"],
            "default" if row["default"] else "",
            "usable" if row["usable"] else row["problem"],
            row["install"],
        )
        for row in found
    ]
    table(("port", "adapter", "", "usable", "to install"), rows)


@reporting
def environments(as_json: JsonOption = False) -> None:
    """List the environments, and whether they can be used."""
    from crucible_kitchen.rl.environments import environment_entries, load_environment

    found = []
    for name in environment_entries():
        row = {"name": name, "usable": True, "problem": "", "install": ""}
        try:
            load_environment(name)
        except CrucibleError as error:
            row |= {"usable": False, "problem": error.message, "install": error.hint or ""}
        found.append(row)
    if as_json:
        answer_json(found)
        return
    rows = [(row["name"], "usable" if row["usable"] else row["problem"], row["install"]) for row in found]
    table(("environment", "usable", "to install"), rows)


@reporting
def describe(
    name: Annotated[
        str,
        typer.Argument(
            metavar="WORKFLOW|RECIPE|STAGE",
            help="A workflow or recipe, or a stage by its name or path (`supervised/epoch/batch/train_step`).",
            show_default=False,
        ),
    ],
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Draw the workflow as a Mermaid flowchart.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Describe a workflow, recipe or stage, with its config keys."""
    from crucible_kitchen.cli.given import target
    from crucible_kitchen.registry import Registry

    registry = Registry.discover()
    known = {*registry.workflows, *registry.recipes}
    if ":" in name or name in known:
        _describe_target(target(registry, name), mermaid=mermaid, as_json=as_json)
        return
    stages = dict(_stages(registry))
    if name not in stages:
        near = difflib.get_close_matches(name, [*known, *stages], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"workflows and recipes: {', '.join(sorted(known))}"
        raise NotFoundError(f"there is no workflow, recipe or stage {name!r}", hint=hint)
    _describe_stage(*stages[name], as_json=as_json)


def _stages(registry: "Registry") -> "Iterator[tuple[str, tuple[Step, type[RunConfig]]]]":
    """Yield the stages of the installed workflows under their path and under their name."""
    from crucible_kitchen.cli.given import target
    from crucible_kitchen.workflow.nodes import Workflow, steps

    for name in registry.workflows:
        try:
            workflow = target(registry, name)
        except CrucibleError:  # a broken one is reported when it is asked for
            continue
        if isinstance(workflow, Workflow):
            for path, step in steps(workflow):
                yield path, (step, workflow.config)
                yield step.name, (step, workflow.config)


def _describe_target(found: "Workflow | Recipe", *, mermaid: bool, as_json: bool) -> None:
    from crucible_kitchen.workflow.describe import describe_step, text
    from crucible_kitchen.workflow.describe import mermaid as drawn
    from crucible_kitchen.workflow.nodes import steps
    from crucible_kitchen.workflow.recipe import Recipe

    workflow = found.workflow if isinstance(found, Recipe) else found
    defaults = dict(found.defaults) if isinstance(found, Recipe) else {}
    keys = _config_rows(workflow.config, workflow.config.model_fields, defaults)
    if as_json:
        row = _recipe_row(found.name, found) if isinstance(found, Recipe) else _workflow_row(found.name, found)
        stages = [{"path": path} | describe_step(step) for path, step in steps(workflow)]
        answer_json(row | {"config": keys, "stages": stages, "text": text(workflow), "mermaid": drawn(workflow)})
        return
    if mermaid:
        answer(drawn(workflow))
        return
    if isinstance(found, Recipe):
        answer(f"recipe {found.name}: {found.description}")
    answer(text(workflow))
    answer()
    _config_table(keys)


def _describe_stage(step: "Step", config: "type[RunConfig]", *, as_json: bool) -> None:
    from crucible_kitchen.workflow.describe import describe_step

    facts = describe_step(step)
    keys = _config_rows(config, facts["config"], {})
    if as_json:
        answer_json(facts | {"config": keys})
        return
    answer(f"{facts['kind']} {facts['name']}: {facts['doc']}")
    for what in ("reads", "writes"):
        for name, kind in facts[what].items():
            answer(f"  {what:<7} {name}: {kind}")
    for port in facts["ports"]:
        answer(f"  {'port':<7} {port}")
    if keys:
        answer()
        _config_table(keys)


def _config_rows(config: "type[RunConfig]", keys: Iterable[str], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Return config keys with type, default and meaning."""
    from crucible_kitchen.workflow.typing import type_name

    rows = []
    for key in keys:
        field = config.model_fields[key]
        required = field.is_required() and key not in defaults
        default = None if required else defaults.get(key, field.get_default(call_default_factory=True))
        rows.append(
            {
                "key": key,
                "type": type_name(field.annotation),
                "required": required,
                "default": plain(default),
                "doc": field.description or "",
            }
        )
    return rows


def _config_table(keys: list[dict[str, Any]]) -> None:
    rows = [(row["key"], "(required)" if row["required"] else _default(row["default"]), row["doc"]) for row in keys]
    table(("config key", "default", "what"), rows)


def _default(value: Any) -> str:
    return "" if value in ("", [], {}, None) else str(value)
