"""The check of a whole workflow before anything runs, as a compiler checks variables.

It follows every path through the tree and knows, at each stage, which names are written, on which paths, with which
type. It runs nothing but the stages' own ``validate`` hooks. Read next: ``crucible_kitchen.workflow.engine``.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args, get_origin

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import WorkflowError
from crucible_kitchen.workflow.binding import LATER_PORTS, PORT_NAMES, RESERVED
from crucible_kitchen.workflow.conditions import (
    adapter_problems,
    hook_problems,
    nested_config,
    port_optional,
    ports_of,
)
from crucible_kitchen.workflow.nodes import Loop, Parallel, Positioned, Stream, When, Workflow, walk
from crucible_kitchen.workflow.scope import Known, Scope, join, written_in
from crucible_kitchen.workflow.stage import Parameter, Resource, Signature, Stage, Step, signature_of
from crucible_kitchen.workflow.stream import Feed
from crucible_kitchen.workflow.typing import fits, recordable, type_name

__all__ = ["PORT_NAMES", "RESERVED", "check", "nested_config", "ports_of"]

_NAME = re.compile(r"[\w.\-]+")


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
    resources = checker.block(workflow.body, scope, workflow.name)
    scope.close(resources, workflow.name)
    checker.names_are_good(workflow)
    for name in workflow.returns:
        checker.returned(name, scope, workflow.name)
    for path, text in adapter_problems(workflow, adapters) if adapters is not None else ():
        checker.problem(path, text)
    if not checker.problems and config is not None:
        for path, text in hook_problems(workflow, config, adapters or {}):
            checker.problem(path, text)
    if checker.problems:
        raise WorkflowError(workflow.name, checker.problems)


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
            elif isinstance(node, Stream):
                self._stream(node, scope, f"{path}/{node.name}")
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
            self._rollback(step, step.hooks.rollback, scope, path)
        if step.writes is None:
            return
        if isinstance(step, Stage) and not recordable(step.write_type):
            kind = type_name(step.write_type)
            self.problem(path, f"writes a {kind}, which cannot be recorded: make it a resource or return a reference")
        live = isinstance(step, Resource)
        self._write(step.writes, Known(step.write_type, step.on_error == "halt", path, live=live), scope, path)

    def _rollback(self, step: Step, hook: Callable[..., Any], scope: Scope, path: str) -> None:
        if scope.depth:
            self.problem(path, "has a rollback inside a loop; compensations stand outside loops")
        inner = scope.fork()
        if step.writes:
            live = isinstance(step, Resource)
            inner.names[step.writes] = Known(step.write_type, definite=True, writer=path, live=live)
        self._reads(hook, inner, path)
        for p in signature_of(hook).parameters:
            known = inner.names.get(p.name)
            if known is not None and known.live and p.name not in RESERVED:
                self.problem(path, f"its rollback reads {p.name!r}, which is closed when it runs; read what it left")

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
            text = f"writes {name!r} as {have}, but {before.writer} wrote it as {was}; a name keeps its type"
            self.problem(path, text)
        elif before and (before.live or known.live) and name not in scope.inherited:
            text = f"writes {name!r}, which {before.writer} wrote; a resource has its name to itself until it closes"
            self.problem(path, text)
        else:
            definite = known.definite or (before is not None and before.definite)
            scope.names[name] = replace(known, definite=definite)
            scope.closed.pop(name, None)
            scope.inherited -= {name}

    def _when(self, node: When, scope: Scope, path: str) -> list[str]:
        self._selector(node.test, scope, path, "the test of a When")
        yes, no = scope.fork(), scope.fork()
        resources = self.block(node.body, yes, path) + self.block(node.otherwise, no, path)
        for name in join(scope, yes, no):
            a, b = yes.names[name], no.names[name]
            self.problem(
                path,
                f"{a.writer} writes {name!r} as {type_name(a.type)}, {b.writer} as {type_name(b.type)}; "
                "a name keeps its type",
            )
        return resources

    def _loop(self, loop: Loop, scope: Scope, path: str) -> None:
        self._selector(loop.over, scope, path, "what a loop is over")
        self._turns(loop, self._item_type(loop, path), scope, path)

    def _stream(self, stream: Stream, scope: Scope, path: str) -> None:
        self._selector(stream.over, scope, path, "what a stream is over")
        feed = signature_of(stream.over).returns
        if isinstance(feed, type) and not fits(feed, Feed):
            self.problem(path, f"is over a {type_name(feed)}, which is no feed: it lacks running, position or seek")
        produce: Step = stream.produce  # the types forbid a resource, people do it
        where = f"{path}/{produce.name}"
        if not isinstance(produce, Stage) or produce.writes is not None:
            self.problem(where, "produces for a stream: it is a stage that writes nothing and returns what it made")
        if stream.draws in RESERVED or stream.draws in scope.names:
            self.problem(path, f"the draw's name {stream.draws!r} is already taken here; give another one: draws=")
        inner = scope.fork()
        inner.names[stream.draws] = Known(Any, definite=True, writer=path, item=True)
        self._step(produce, inner, where)
        self._turns(stream, Any, scope, path)

    def _turns(self, loop: Loop | Stream, item: Any, scope: Scope, path: str) -> None:
        if loop.name in RESERVED or loop.name in scope.names or loop.name in scope.later:
            self.problem(path, f"the loop's name {loop.name!r} is already taken here; give it a new one")
        turn = replace(scope.fork(), depth=scope.depth + 1, inherited=frozenset())
        turn.names[loop.name] = Known(item, definite=True, writer=path, item=True)
        turn.later = scope.later | dict(written_in(loop.body, path))
        turn.close(self.block(loop.body, turn, path), path)
        if isinstance(loop, Loop) and loop.until:
            self._selector(loop.until, turn, f"{path} (until)", "until")
        turn.names.pop(loop.name, None)
        inherited = scope.inherited
        join(scope, turn, scope.fork())
        scope.inherited = inherited

    def _item_type(self, loop: Loop, path: str) -> Any:
        returns = signature_of(loop.over).returns
        origin, args = get_origin(returns) or returns, get_args(returns)
        if origin is range:
            return int
        if origin in (Any, object) or not isinstance(origin, type):
            return Any
        indexed = hasattr(origin, "__len__") and hasattr(origin, "__getitem__") and not issubclass(origin, Mapping)
        if indexed or fits(origin, Positioned):
            one = len(args) == 1 or (len(args) == 2 and args[1] is Ellipsis)
            return args[0] if one else Any
        self.problem(path, f"loops over a {type_name(returns)}; a Sequence, a range or a Positioned can be resumed")
        return Any

    def _parallel(self, node: Parallel, scope: Scope, path: str) -> None:
        written: dict[str, Known] = {}
        closed = dict(scope.closed)
        for branch in node.branches:
            inner = scope.copy_of_state()
            inner.close(self.block(branch, inner, path), path)
            closed |= inner.closed
            for name, known in inner.names.items():
                before = scope.names.get(name)
                if known is before:
                    continue
                if name in written:
                    both = f"{written[name].writer} and {known.writer}"
                    self.problem(path, f"two branches write {name!r}: {both}; branches write different names")
                if before is not None and before.live:
                    self.problem(path, f"{known.writer} writes {name!r}, which is the open resource {before.writer}")
                keeps = node.on_error == "halt" or (before is not None and before.definite)
                written[name] = known if keeps else replace(known, definite=False)
        scope.names |= written
        scope.closed = closed
        scope.inherited -= written.keys()

    def _nested(self, node: Workflow, scope: Scope, path: str) -> None:
        inner = replace(scope.copy_of_state(), config=node.config)
        self._nested_config(node, scope, path)
        inner.close(self.block(node.body, inner, path), path)
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
                    "inherit from it, or nest it with .at('<field>')",
                )
            return
        outer_field = scope.config.model_fields.get(node.config_field)
        if outer_field is None:
            text = f"takes its config from {node.config_field!r}, which {scope.config.__name__} does not have"
            self.problem(path, f"{text}; add the field")
        elif not fits(outer_field.annotation, node.config):
            kind = type_name(outer_field.annotation)
            self.problem(path, f"needs a {node.config.__name__}, but {node.config_field!r} is a {kind}")

    # -- reads ----------------------------------------------------------------------------------------------------

    def _selector(self, fn: Any, scope: Scope, path: str, what: str) -> None:
        if isinstance(fn, Step) or inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
            self.problem(path, f"{what} is a plain function; this one has to be awaited: let a stage write it before")
        elif not callable(fn):
            self.problem(path, f"{what} is a function, not a {type(fn).__name__}: write `lambda: ...`")
        else:
            self._reads(fn, scope, path)

    def _hook_reads(self, hook: Callable[..., Any], scope: Scope, path: str) -> None:
        if inspect.iscoroutinefunction(hook):
            self.problem(path, "its validate hook is a coroutine; preconditions are plain functions")
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
        if p.type is not Any and isinstance(p.type, type) and not issubclass(scope.config, p.type):
            want, have = p.type.__name__, scope.config.__name__
            self.problem(path, f"needs a {want}, but the workflow's config is a {have}; inherit from it")

    def _port_read(self, p: Parameter, path: str) -> None:
        if p.name in LATER_PORTS:
            self.problem(path, f"reads the port {p.name!r}, which has no adapters yet")
        elif self._adapters is not None and self._adapters.get(p.name) is None and not port_optional(p):
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
        so_far = f"written so far: {', '.join(sorted(scope.names)) or 'nothing'}"
        return f"reads {name!r}, which no stage before it writes; {f'did you mean {near[0]!r}?' if near else so_far}"

    def returned(self, name: str, scope: Scope, path: str) -> None:
        """Check a name of ``returns``."""
        if name in scope.closed and name not in scope.names:
            self.problem(path, f"returns {name!r}, which is closed when it ends")
        elif name not in scope.names or not scope.names[name].definite:
            self.problem(path, f"returns {name!r}, which it does not write on every path")

    def names_are_good(self, workflow: Workflow) -> None:
        """Check that no two nodes have one path, and that a path can be taken apart: records are found by it."""
        seen: set[str] = set()
        for path, node in walk(workflow):
            if name := getattr(node, "name", ""):
                if path in seen:
                    self.problem(path, "two nodes here have this name; rename one with .with_(name=...)")
                if not _NAME.fullmatch(name):
                    self.problem(path, f"is named {name!r}; names have letters, digits, '_', '-' and '.'")
                seen.add(path)
