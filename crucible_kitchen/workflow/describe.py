"""A workflow as text and as a Mermaid flowchart, with what each stage reads, writes and is configured by.

Pure functions over the tree. Read next: ``crucible_kitchen.workflow.nodes``.
"""

from collections.abc import Iterator
from typing import Any

from crucible_kitchen.config import RunConfig
from crucible_kitchen.types import JsonObject
from crucible_kitchen.workflow.binding import PORT_NAMES, RESERVED
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, When, Workflow
from crucible_kitchen.workflow.stage import Resource, Step
from crucible_kitchen.workflow.typing import type_name

__all__ = ["describe_step", "mermaid", "text"]


def describe_step(step: Step) -> JsonObject:
    """Return what a stage reads and writes as a JSON object."""
    reads = [p for p in step.signature.parameters if p.name not in RESERVED]
    return {
        "name": step.name,
        "kind": "resource" if isinstance(step, Resource) else "stage",
        "doc": step.doc,
        "reads": {p.name: type_name(p.type) + (" (optional)" if p.optional else "") for p in reads},
        "ports": [p.name for p in step.signature.parameters if p.name in PORT_NAMES],
        "writes": {step.writes: type_name(step.write_type)} if step.writes else {},
        "config": config_keys(step),
    }


def config_keys(step: Step) -> list[str]:
    """Return the config keys of the part that a stage names, without those that every run has."""
    part = next((p.type for p in step.signature.parameters if p.name == "config"), None)
    if not (isinstance(part, type) and issubclass(part, RunConfig)):
        return []
    return [key for key in part.model_fields if key not in RunConfig.model_fields]


def text(workflow: Workflow) -> str:
    """Return the tree as indented text, one node a line."""
    head = f"{workflow.name}({workflow.config.__name__})"
    lines = [head + (f": {workflow.description}" if workflow.description else "")]
    lines += _lines(workflow.body, "  ")
    return "\n".join(lines)


def _lines(nodes: tuple[Node, ...], indent: str) -> Iterator[str]:
    deeper = indent + "  "
    for node in nodes:
        if isinstance(node, Step):
            yield f"{indent}{_step_line(node)}"
        elif isinstance(node, Loop):
            until = f", until {_name(node.until)}" if node.until else ""
            yield f"{indent}for {node.name} in {_name(node.over)}{until}"
            yield from _lines(node.body, deeper)
        elif isinstance(node, When):
            yield f"{indent}when {_name(node.test)}"
            yield from _lines(node.body, deeper)
            if node.otherwise:
                yield f"{indent}otherwise"
                yield from _lines(node.otherwise, deeper)
        elif isinstance(node, Parallel):
            limit = f", {node.limit} at a time" if node.limit else ""
            yield f"{indent}in parallel{limit}"
            for number, branch in enumerate(node.branches, 1):
                yield f"{deeper}branch {number}"
                yield from _lines(branch, deeper + "  ")
        else:
            returns = f" -> {', '.join(node.returns)}" if node.returns else ""
            yield f"{indent}workflow {node.name}{returns}"
            yield from _lines(node.body, deeper)


def _step_line(step: Step) -> str:
    facts = describe_step(step)
    reads = ", ".join([*facts["ports"], *facts["reads"]])
    arrow = f" -> {step.writes}" if step.writes else ""
    config = next((p.type for p in step.signature.parameters if p.name == "config"), None)
    keyed = f"  [{config.__name__}]" if isinstance(config, type) and config is not Any else ""
    live = " (open until the block ends)" if isinstance(step, Resource) else ""
    return f"{step.name}({reads}){arrow}{keyed}{live}"


def _name(fn: Any) -> str:
    name: str = getattr(fn, "__name__", repr(fn))
    return "(expression)" if name == "<lambda>" else name


def mermaid(workflow: Workflow) -> str:
    """Return the tree as a Mermaid flowchart: loops, branches and nested workflows are subgraphs."""
    return "\n".join(["flowchart TD", *_Chart().draw(workflow)])


class _Chart:
    """Draws one workflow; ids count up in the order of the tree."""

    def __init__(self) -> None:
        self._count = 0
        self._lines: list[str] = []

    def draw(self, workflow: Workflow) -> list[str]:
        self._block(workflow.body, [], "  ")
        return self._lines

    def _id(self) -> str:
        self._count += 1
        return f"n{self._count}"

    def _block(self, nodes: tuple[Node, ...], ends: list[str], indent: str) -> list[str]:
        """Draw nodes after the given ends; returns the new ends."""
        for node in nodes:
            if isinstance(node, Step):
                ends = self._box(ends, indent, _label(node.name, node.writes), round_=isinstance(node, Resource))
            elif isinstance(node, When):
                test = self._box(ends, indent, _name(node.test), diamond=True)
                no = self._block(node.otherwise, test, indent) if node.otherwise else test
                ends = [*self._block(node.body, test, indent), *no]
            elif isinstance(node, Parallel):
                fork = ends
                ends = [end for branch in node.branches for end in self._block(branch, fork, indent)]
            else:
                title = f"for {node.name} in {_name(node.over)}" if isinstance(node, Loop) else node.name
                self._lines.append(f'{indent}subgraph {self._id()}["{title}"]')
                inner = self._block(node.body, ends, indent + "  ")
                self._lines.append(f"{indent}end")
                ends = inner
        return ends

    def _box(
        self, ends: list[str], indent: str, label: str, *, round_: bool = False, diamond: bool = False
    ) -> list[str]:
        new = self._id()
        left, right = ("{", "}") if diamond else ("([", "])") if round_ else ("[", "]")
        self._lines.append(f'{indent}{new}{left}"{label}"{right}')
        self._lines += [f"{indent}{end} --> {new}" for end in dict.fromkeys(ends)]
        return [new]


def _label(name: str, writes: str | None) -> str:
    return f"{name}<br/>→ {writes}" if writes else name
