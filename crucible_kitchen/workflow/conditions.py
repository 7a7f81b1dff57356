"""What of a workflow's check depends on the run: the adapters it is given and its stages' own preconditions.

It calls no adapter's method but what the stages' hooks ask of it. Read next: ``crucible_kitchen.workflow.check``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.ports import PORTS
from crucible_kitchen.workflow.binding import PORT_NAMES
from crucible_kitchen.workflow.failures import says
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, Stream, When, Workflow, children, walk
from crucible_kitchen.workflow.stage import Parameter, Step, signature_of
from crucible_kitchen.workflow.typing import is_optional

__all__ = ["adapter_problems", "hook_problems", "nested_config", "port_optional", "ports_of"]


def port_optional(p: Parameter) -> bool:
    """Return whether a stage can do without this port's adapter."""
    return p.optional or is_optional(p.type)


def nested_config(node: Workflow, outer: RunConfig) -> Any:
    """Return the config of a nested workflow: a field of the outer config, or the outer config itself."""
    return getattr(outer, node.config_field) if node.config_field else outer


def ports_of(workflow: Workflow) -> dict[str, bool]:
    """Return the ports a workflow reads: True where some stage cannot do without."""
    found: dict[str, bool] = {}
    for function in _functions(workflow):
        for p in signature_of(function).parameters:
            if p.name in PORT_NAMES:
                found[p.name] = found.get(p.name, False) or not port_optional(p)
    return found


def _functions(workflow: Workflow) -> Iterator[Callable[..., Any]]:
    """Yield everything the engine will inject."""
    for _, node in walk(workflow):
        if isinstance(node, Step):
            yield node.fn
            yield from node.hooks.validate
            if node.hooks.rollback:
                yield node.hooks.rollback
        elif isinstance(node, Loop):
            yield node.over
            if node.until:
                yield node.until
        elif isinstance(node, Stream):
            yield node.over
        elif isinstance(node, When):
            yield node.test


def adapter_problems(workflow: Workflow, adapters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, problem) for each adapter that lacks methods of its port."""
    for port in ports_of(workflow):
        adapter = adapters.get(port)
        if adapter is None or port not in PORTS:
            continue
        wanted = [n for n in dir(PORTS[port].protocol) if not n.startswith("_")]
        missing = [n for n in wanted if not hasattr(type(adapter), n) and not hasattr(adapter, n)]
        if missing:
            kind = type(adapter).__name__
            yield workflow.name, f"the adapter {kind} for {port!r} lacks {', '.join(missing)}"


def hook_problems(workflow: Workflow, config: RunConfig, adapters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Run the stages' preconditions with the config and adapters of the run; yield (path, problem)."""
    for path, step, inner in _steps_with_config(workflow.body, config, workflow.name):
        for hook in step.hooks.validate:
            values = {"config": inner} | {n: a for n, a in adapters.items() if a is not None}
            try:
                hook(**{p.name: values.get(p.name, p.default) for p in signature_of(hook).parameters})
            except CrucibleError as error:
                yield path, error.message + (f" ({error.hint})" if error.hint else "")
            except Exception as error:  # noqa: BLE001 - user code; a broken hook is a problem like any other
                yield path, f"its validate hook failed: {says(error)}"


def _steps_with_config(nodes: Sequence[Node], config: RunConfig, path: str) -> Iterator[tuple[str, Step, RunConfig]]:
    """Yield every stage with its path and the config it will be given."""
    for node in nodes:
        if isinstance(node, Step):
            yield f"{path}/{node.name}", node, config
        elif isinstance(node, Workflow):
            yield from _steps_with_config(node.body, nested_config(node, config), f"{path}/{node.name}")
        elif isinstance(node, (Loop, Stream)):
            yield from _steps_with_config(children(node), config, f"{path}/{node.name}")
        elif isinstance(node, When):
            yield from _steps_with_config(node.body + node.otherwise, config, path)
        elif isinstance(node, Parallel):
            for branch in node.branches:
                yield from _steps_with_config(branch, config, path)
