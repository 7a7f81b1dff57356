"""A workflow as text and as a Mermaid flowchart, with what each stage reads, writes and is configured by.

Pure functions over the tree. Read next: ``crucible_kitchen.workflow.nodes``.
"""

from collections.abc import Iterator
from typing import Any

from crucible_kitchen.config import RunConfig
from crucible_kitchen.types import JsonObject
from crucible_kitchen.workflow.binding import PORT_NAMES, RESERVED
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, Stream, When, Workflow
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
            yield f"{indent}{_loop_title(node)}"
            yield from _lines(node.body, deeper)
        elif isinstance(node, Stream):
            yield f"{indent}{_stream_title(node)}"
            yield f"{deeper}beside it, for each {node.draws}: {_step_line(node.produce)}"
            yield from _lines(node.body, deeper)
        elif isinstance(node, When):
            yield f"{indent}when {_name(node.test)}"
            yield from _lines(node.body, deeper)
            if node.otherwise:
                yield f"{indent}otherwise"
                yield from _lines(node.otherwise, deeper)
        elif isinstance(node, Parallel):
            limit = f", {node.limit} at a time" if node.limit else ""
            skip = ", skipping what fails" if node.on_error == "skip" else ""
            yield f"{indent}in parallel{limit}{skip}"
            for number, branch in enumerate(node.branches, 1):
                yield f"{deeper}branch {number}"
                yield from _lines(branch, deeper + "  ")
        else:
            returns = f" -> {', '.join(node.returns)}" if node.returns else ""
            yield f"{indent}workflow {node.name}{returns}"
            yield from _lines(node.body, deeper)


def _step_line(step: Step) -> str:
    arrow = f" -> {step.writes}" if step.writes else ""
    part = _config_part(step)
    live = " (open until the block ends)" if isinstance(step, Resource) else ""
    return f"{_call(step)}{arrow}{f'  [{part}]' if part else ''}{live}"


def _call(step: Step) -> str:
    """Return a stage with what it reads: ports first, then state."""
    facts = describe_step(step)
    return f"{step.name}({', '.join([*facts['ports'], *facts['reads']])})"


def _config_part(step: Step) -> str:
    """Return the name of the config part that a stage asks for, or nothing."""
    config = next((p.type for p in step.signature.parameters if p.name == "config"), Any)
    return config.__name__ if isinstance(config, type) and config is not Any else ""


def _loop_title(node: Loop) -> str:
    return f"for {node.name} in {_name(node.over)}" + (f", until {_name(node.until)}" if node.until else "")


def _title(node: Loop | Stream) -> str:
    return _loop_title(node) if isinstance(node, Loop) else _stream_title(node)


def _stream_title(node: Stream) -> str:
    return f"stream {node.name} from {_name(node.over)}"


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
        """Return the lines of the chart."""
        self._block(workflow.body, [], "  ")
        return self._lines

    def _id(self) -> str:
        self._count += 1
        return f"n{self._count}"

    def _block(self, nodes: tuple[Node, ...], ends: list[str], indent: str) -> list[str]:
        """Draw nodes after the given ends, each an id, perhaps with its answer; returns the new ends."""
        for node in nodes:
            if isinstance(node, Step):
                shape = ("([", "])") if isinstance(node, Resource) else ("[", "]")
                ends = [self._box(ends, indent, _label(node), shape)]
            elif isinstance(node, When):
                test = self._box(ends, indent, _name(node.test), ("{", "}"))
                yes, no = [f"{test} -->|yes|"], [f"{test} -->|no|"]
                ends = [*self._block(node.body, yes, indent), *self._block(node.otherwise, no, indent)]
            elif isinstance(node, Parallel):
                fork = ends
                ends = [end for branch in node.branches for end in self._block(branch, fork, indent)] or fork
            else:
                ends = self._subgraph(node, ends, indent)
        return ends

    def _subgraph(self, node: Loop | Stream | Workflow, ends: list[str], indent: str) -> list[str]:
        title = node.name if isinstance(node, Workflow) else _title(node)
        self._lines.append(f'{indent}subgraph {self._id()}["{_quoted(title)}"]')
        if isinstance(node, Stream):
            ends = [*ends, self._box(ends, indent + "  ", _label(node.produce), ("[[", "]]"))]
        ends = self._block(node.body, ends, indent + "  ")
        self._lines.append(f"{indent}end")
        return ends

    def _box(self, ends: list[str], indent: str, label: str, shape: tuple[str, str]) -> str:
        new = self._id()
        self._lines.append(f'{indent}{new}{shape[0]}"{_quoted(label)}"{shape[1]}')
        for end in dict.fromkeys(ends):
            self._lines.append(f"{indent}{end if '-->' in end else f'{end} -->'} {new}")
        return new


def _quoted(label: str) -> str:
    return label.replace('"', "#quot;")


def _label(step: Step) -> str:
    part = _config_part(step)
    lines = [_call(step), f"→ {step.writes}" if step.writes else "", f"config: {part}" if part else ""]
    return "<br/>".join(line for line in lines if line)
