"""The check of a whole workflow before anything runs, as a compiler checks variables.

It follows every path through the tree and knows, at each stage, which names are written, on which paths, with which
type. It runs nothing but the stages' own ``validate`` hooks. Read next: ``crucible_kitchen.workflow.engine``.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_origin

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CrucibleError, WorkflowError
from crucible_kitchen.ports import PORTS
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, Positioned, When, Workflow, steps, walk
from crucible_kitchen.workflow.stage import Parameter, Resource, Signature, Stage, Step, signature_of
from crucible_kitchen.workflow.typing import fits, is_optional, recordable, type_name

__all__ = ["RESERVED", "check", "ports_of"]

_LATER_PORTS = ("hub_client", "feedback_client", "metrics_store", "embedding_client", "vector_store")
PORT_NAMES = frozenset(PORTS) | frozenset(_LATER_PORTS)
RESERVED = frozenset({"run", "config"}) | PORT_NAMES


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a name at a place: its type, whether every path wrote it, who wrote it."""

    type: Any
    definite: bool
    writer: str
    item: bool = False


@dataclass
class Scope:
    """The names visible at a place. ``later`` are written further down in an enclosing loop's body."""

    config: type[RunConfig]
    names: dict[str, Known] = field(default_factory=dict)
    later: dict[str, Known] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    depth: int = 0

    def fork(self) -> "Scope":
        """Return a copy whose changes do not show here."""
        return Scope(self.config, dict(self.names), dict(self.later), dict(self.closed), self.depth)


def check(workflow: Workflow, *, adapters: Mapping[str, Any] | None = None, config: RunConfig | None = None) -> None:
    """Check a workflow; with adapters and a config also what depends on them.

    Args:
        workflow: the tree.
        adapters: adapter by port name, as the run will have them; None leaves adapters unchecked.
        config: the run's config, for the stages' ``validate`` hooks; None leaves them out.

    Raises:
        WorkflowError: with every problem found, each with its stage's path and what to do.
    """
    checker = _Checker(adapters)
    scope = Scope(workflow.config)
    checker.block(workflow.body, scope, workflow.name)
    checker.names_are_unique(workflow)
    for name in workflow.returns:
        checker.returned(name, scope, workflow.name)
    if adapters is not None:
        checker.adapters_fulfil_ports(workflow)
    if not checker.problems and config is not None:
        checker.run_hooks(workflow, config, adapters or {})
    if checker.problems:
        raise WorkflowError(workflow.name, checker.problems)


def ports_of(workflow: Workflow) -> dict[str, bool]:
    """Return the ports a workflow reads: True where some stage cannot do without."""
    found: dict[str, bool] = {}
    for _, function in _functions(workflow):
        for p in signature_of(function).parameters:
            if p.name in PORT_NAMES:
                found[p.name] = found.get(p.name, False) or not _port_optional(p)
    return found


def _functions(workflow: Workflow) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield (path, function) for everything the engine will inject."""
    for path, node in walk(workflow):
        if isinstance(node, Step):
            yield path, node.fn
            yield from ((path, hook) for hook in node.hooks.validate)
            if node.hooks.rollback:
                yield path, node.hooks.rollback
        elif isinstance(node, Loop):
            yield path, node.over
            if node.until:
                yield path, node.until
        elif isinstance(node, When):
            yield path, node.test


class _Checker:
    """One walk over one tree, collecting problems."""

    def __init__(self, adapters: Mapping[str, Any] | None) -> None:
        self.problems: list[str] = []
        self._adapters = adapters

    def problem(self, path: str, text: str) -> None:
        line = f"{path}: {text}"
        if line not in self.problems:
            self.problems.append(line)

    # -- the walk -------------------------------------------------------------------------------------------------

    def block(self, nodes: Sequence[Any], scope: Scope, path: str) -> list[str]:
        """Check nodes in order; returns the names that resources of this block wrote."""
        resources: list[str] = []
        for node in nodes:
            if isinstance(node, Step):
                self._step(node, scope, f"{path}/{node.name}")
                if isinstance(node, Resource) and node.writes:
                    resources.append(node.writes)
            elif isinstance(node, When):
                resources += self._when(node, scope, path)
            elif isinstance(node, Loop):
                self._loop(node, scope, f"{path}/{node.name}")
            elif isinstance(node, Parallel):
                self._parallel(node, scope, path)
            elif isinstance(node, Workflow):
                self._nested(node, scope, f"{path}/{node.name}")
            else:  # a plain function, say: the types forbid it, people do it
                self.problem(path, f"{node!r} is not a node: decorate the coroutine with @stage()")
        return resources

    def _step(self, step: Step, scope: Scope, path: str) -> None:
        self._reads(step.fn, scope, path)
        for hook in step.hooks.validate:
            self._hook_reads(hook, scope, path)
        if step.hooks.rollback:
            if scope.depth:
                self.problem(path, "has a rollback inside a loop; compensations stand outside loops")
            self._reads(step.hooks.rollback, _with_own_write(step, scope, path), path)
        if step.writes is None:
            return
        if isinstance(step, Stage) and not recordable(step.write_type):
            kind = type_name(step.write_type)
            self.problem(path, f"writes a {kind}, which cannot be recorded: make it a resource or return a reference")
        self._write(step.writes, Known(step.write_type, step.on_error == "halt", path), scope, path)

    def _write(self, name: str, known: Known, scope: Scope, path: str) -> None:
        before = scope.names.get(name)
        if name in RESERVED:
            self.problem(path, f"writes {name!r}, which is reserved")
        elif not name.isidentifier():
            self.problem(path, f"writes {name!r}, which is not an identifier")
        elif before and before.item:
            self.problem(path, f"writes {name!r}, which is the item of the loop {before.writer}")
        elif before and not fits(known.type, before.type):
            have, was = type_name(known.type), type_name(before.type)
            self.problem(
                path, f"writes {name!r} as {have}, but {before.writer} wrote it as {was}; a name keeps its type"
            )
        else:
            definite = known.definite or (before is not None and before.definite)
            scope.names[name] = replace(known, definite=definite)
            scope.closed.pop(name, None)

    def _when(self, node: When, scope: Scope, path: str) -> list[str]:
        self._reads(node.test, scope, path)
        yes, no = scope.fork(), scope.fork()
        resources = self.block(node.body, yes, path) + self.block(node.otherwise, no, path)
        _join(scope, yes, no)
        return resources

    def _loop(self, loop: Loop, scope: Scope, path: str) -> None:
        self._reads(loop.over, scope, path)
        item = self._item_type(loop, path)
        if loop.name in RESERVED or loop.name in scope.names:
            self.problem(path, f"the loop's name {loop.name!r} is already taken here; give it a new one")
        turn = scope.fork()
        turn.depth += 1
        turn.names[loop.name] = Known(item, definite=True, writer=path, item=True)
        turn.later = scope.later | _written_below(loop, path)
        resources = self.block(loop.body, turn, path)
        self._close(turn, resources, path)
        if loop.until:
            self._reads(loop.until, turn, f"{path} (until)")
        turn.names.pop(loop.name, None)
        _join(scope, turn, scope.fork())

    def _item_type(self, loop: Loop, path: str) -> Any:
        returns = signature_of(loop.over).returns
        origin, args = get_origin(returns) or returns, get_args(returns)
        if origin is range:
            return int
        if origin is Any or not isinstance(origin, type):
            return Any
        if issubclass(origin, Sequence) or origin is Positioned or fits(origin, Positioned):
            return args[0] if args else Any
        if origin is not object:
            self.problem(path, f"loops over a {type_name(returns)}; a Sequence, a range or a Positioned can be resumed")
        return Any

    def _parallel(self, node: Parallel, scope: Scope, path: str) -> None:
        writers: dict[str, str] = {}
        merged = scope.fork()
        for branch in node.branches:
            inner = scope.fork()
            resources = self.block(branch, inner, path)
            written = {n for n, k in inner.names.items() if scope.names.get(n) is not k}
            for name in sorted(written):
                writer = inner.names[name].writer
                if name in writers:
                    self.problem(
                        path,
                        f"two branches write {name!r}: {writers[name]} and {writer}; branches write different names",
                    )
                writers[name] = writer
            self._close(inner, resources, path)
            for name in written & inner.names.keys():
                known = inner.names[name]
                merged.names[name] = known if node.on_error == "halt" else replace(known, definite=name in scope.names)
            merged.closed |= inner.closed
        scope.names, scope.closed = merged.names, merged.closed

    def _nested(self, node: Workflow, scope: Scope, path: str) -> None:
        inner = scope.fork()
        inner.config = node.config
        self._nested_config(node, scope, path)
        resources = self.block(node.body, inner, path)
        self._close(inner, resources, path)
        for name in node.returns:
            self.returned(name, inner, path)
            if name in inner.names:
                self._write(name, inner.names[name], scope, path)

    def _nested_config(self, node: Workflow, scope: Scope, path: str) -> None:
        if node.config_field is None:
            if not issubclass(scope.config, node.config):
                self.problem(
                    path,
                    f"needs a {node.config.__name__}, but the outer config is a {scope.config.__name__}; "
                    f"inherit from it, or nest it with .at('<field>')",
                )
            return
        outer_field = scope.config.model_fields.get(node.config_field)
        if outer_field is None:
            self.problem(
                path, f"takes its config from {node.config_field!r}, which {scope.config.__name__} does not have"
            )
        elif not fits(outer_field.annotation, node.config):
            kind = type_name(outer_field.annotation)
            self.problem(path, f"needs a {node.config.__name__}, but {node.config_field!r} is a {kind}")

    def _close(self, scope: Scope, resources: Sequence[str], path: str) -> None:
        for name in resources:
            scope.names.pop(name, None)
            scope.closed[name] = path

    # -- reads ----------------------------------------------------------------------------------------------------

    def _hook_reads(self, hook: Callable[..., Any], scope: Scope, path: str) -> None:
        for p in signature_of(hook).parameters:
            if p.name != "config" and p.name not in PORT_NAMES:
                self.problem(path, f"its validate hook reads {p.name!r}; before a run there are only config and ports")
        self._reads(hook, Scope(scope.config), path, only_reserved=True)

    def _reads(self, fn: Callable[..., Any], scope: Scope, path: str, *, only_reserved: bool = False) -> None:
        signature: Signature = signature_of(fn)
        if signature.problem:
            self.problem(path, signature.problem)
        for p in signature.parameters:
            if p.name == "config":
                self._config_read(p, scope, path)
            elif p.name in PORT_NAMES:
                self._port_read(p, path)
            elif p.name != "run" and not only_reserved:
                self._state_read(p, scope, path)

    def _config_read(self, p: Parameter, scope: Scope, path: str) -> None:
        if isinstance(p.type, type) and not issubclass(scope.config, p.type):
            self.problem(
                path,
                f"needs a {p.type.__name__}, but the workflow's config is a {scope.config.__name__}; inherit from it",
            )

    def _port_read(self, p: Parameter, path: str) -> None:
        if p.name in _LATER_PORTS:
            self.problem(path, f"reads the port {p.name!r}, which has no adapters yet")
        elif self._adapters is not None and self._adapters.get(p.name) is None and not _port_optional(p):
            self.problem(path, f"needs an adapter for {p.name!r}; give one: --adapter {p.name}=NAME")

    def _state_read(self, p: Parameter, scope: Scope, path: str) -> None:
        known = scope.names.get(p.name)
        if known is None and p.optional:
            known = scope.later.get(p.name)
            if known is None:
                return
        if known is None:
            self.problem(path, self._unwritten(p.name, scope))
        elif not known.definite and not p.optional:
            self.problem(
                path,
                f"reads {p.name!r}, which {known.writer} writes on some paths only; "
                "give the parameter a default or write it on every path",
            )
        elif not fits(known.type, p.type):
            have, want = type_name(known.type), type_name(p.type)
            self.problem(path, f"reads {p.name!r} as {want}, but {known.writer} writes {have}")

    def _unwritten(self, name: str, scope: Scope) -> str:
        if name in scope.closed:
            return f"reads {name!r}, which was closed when {scope.closed[name]} ended"
        if name in scope.later:
            return f"reads {name!r}, which only {scope.later[name].writer} writes, later in the loop; give it a default"
        near = difflib.get_close_matches(name, scope.names, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"written so far: {', '.join(sorted(scope.names)) or 'nothing'}"
        )
        return f"reads {name!r}, which no stage before it writes; {hint}"

    def returned(self, name: str, scope: Scope, path: str) -> None:
        """Check a name of ``returns``."""
        if name not in scope.names or not scope.names[name].definite:
            self.problem(path, f"returns {name!r}, which it does not write on every path")

    # -- what depends on the run ----------------------------------------------------------------------------------

    def names_are_unique(self, workflow: Workflow) -> None:
        """Check that no two nodes have one path: records and events are found by it."""
        seen: set[str] = set()
        for path, node in walk(workflow):
            if getattr(node, "name", ""):
                if path in seen:
                    self.problem(path, "two nodes here have this name; rename one with .with_(name=...)")
                seen.add(path)

    def adapters_fulfil_ports(self, workflow: Workflow) -> None:
        """Check that each adapter has the methods of its port."""
        assert self._adapters is not None
        for port in ports_of(workflow):
            adapter = self._adapters.get(port)
            if adapter is None or port not in PORTS:
                continue
            wanted = [n for n in dir(PORTS[port].protocol) if not n.startswith("_")]
            missing = [n for n in wanted if not hasattr(type(adapter), n) and not hasattr(adapter, n)]
            if missing:
                kind = type(adapter).__name__
                self.problem(workflow.name, f"the adapter {kind} for {port!r} lacks {', '.join(missing)}")

    def run_hooks(self, workflow: Workflow, config: RunConfig, adapters: Mapping[str, Any]) -> None:
        """Run the stages' preconditions with the config and adapters of the run."""
        for path, step, inner in _steps_with_config(workflow, config, workflow.name):
            for hook in step.hooks.validate:
                values = {"config": inner} | dict(adapters)
                arguments = {p.name: values.get(p.name) for p in signature_of(hook).parameters}
                try:
                    hook(**arguments)
                except CrucibleError as error:
                    self.problem(path, error.message + (f" ({error.hint})" if error.hint else ""))


def _steps_with_config(workflow: Workflow, config: RunConfig, path: str) -> Iterator[tuple[str, Step, RunConfig]]:
    """Yield every stage with its path and the config it will be given."""

    def visit(nodes: Sequence[Node], config: RunConfig, path: str) -> Iterator[tuple[str, Step, RunConfig]]:
        for node in nodes:
            if isinstance(node, Step):
                yield f"{path}/{node.name}", node, config
            elif isinstance(node, Workflow):
                yield from _steps_with_config(node, nested_config(node, config), f"{path}/{node.name}")
            elif isinstance(node, Loop):
                yield from visit(node.body, config, f"{path}/{node.name}")
            elif isinstance(node, When):
                yield from visit(node.body + node.otherwise, config, path)
            else:
                for branch in node.branches:
                    yield from visit(branch, config, path)

    yield from visit(workflow.body, config, path)


def nested_config(node: Workflow, outer: RunConfig) -> Any:
    """Return the config of a nested workflow: a field of the outer config, or the outer config itself."""
    return getattr(outer, node.config_field) if node.config_field else outer


def _port_optional(p: Parameter) -> bool:
    return p.optional or is_optional(p.type)


def _with_own_write(step: Step, scope: Scope, path: str) -> Scope:
    inner = scope.fork()
    if step.writes:
        inner.names[step.writes] = Known(step.write_type, definite=True, writer=path)
    return inner


def _written_below(loop: Loop, path: str) -> dict[str, Known]:
    """Return what stages in a loop's body write, for optional reads of an earlier turn's values."""
    prefix = path.rpartition("/")[0]
    return {s.writes: Known(s.write_type, definite=False, writer=f"{prefix}/{p}") for p, s in steps(loop) if s.writes}


def _join(scope: Scope, one: Scope, other: Scope) -> None:
    """Merge two paths into their join: definite is what both wrote, maybe what one wrote."""
    joined: dict[str, Known] = {}
    for name in one.names.keys() | other.names.keys():
        a, b = one.names.get(name), other.names.get(name)
        known = a or b
        assert known is not None
        joined[name] = replace(known, definite=bool(a and a.definite and b and b.definite))
    scope.names = joined
    scope.closed = one.closed | other.closed
