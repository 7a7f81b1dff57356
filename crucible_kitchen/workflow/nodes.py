"""The workflow as a value: an immutable tree of stages and control nodes.

Checking, describing and running are three functions over this tree, in their own files; nothing is registered by side
effect, nothing parsed at run time. Read next: ``crucible_kitchen.workflow.check``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from crucible_kitchen.config import RunConfig
from crucible_kitchen.types import Json
from crucible_kitchen.workflow.stage import Resource, Stage, Step

__all__ = [
    "Loop",
    "Node",
    "Parallel",
    "Positioned",
    "Selector",
    "Stream",
    "When",
    "Workflow",
    "children",
    "steps",
    "walk",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
N = TypeVar("N", "Loop", "When", "Parallel", "Stream", "Workflow")

Selector: TypeAlias = Callable[..., T]
"""A plain pure function, injected like a stage and evaluated again on resume."""

Node: TypeAlias = "Stage[..., Any] | Resource[..., Any] | Loop | When | Parallel | Stream | Workflow"


@runtime_checkable
class Positioned(Protocol[T_co]):
    """An async iterable that can say where it is and go back there; what loops over data streams take."""

    def __aiter__(self) -> Any:
        """Iterate from the current position."""
        ...

    def position(self) -> Json:
        """Return the place of the next item."""
        ...

    def seek(self, position: Json) -> None:
        """Make this place the next item."""
        ...


@dataclass(frozen=True, init=False)
class Loop:
    """Runs its body once per item; the body reads the item under the loop's name.

    Args:
        name: a name that is new where the loop stands.
        over: gives a Sequence, a range or a :class:`Positioned`; no items, no turns.
        body: the nodes of one turn.
        until: ends the loop after the turn at whose end it is true.

    Example::

        Loop("epoch", lambda config: range(config.epochs), train_epoch, until=good_enough)
    """

    name: str
    over: Selector[Any]
    body: tuple[Node, ...]
    until: Selector[bool] | None = None

    def __init__(self, name: str, over: Selector[Any], *body: Node, until: Selector[bool] | None = None) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "over", over)
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "until", until)


@dataclass(frozen=True, init=False)
class When:
    """Runs its body if the test holds, else ``otherwise``; invisible in paths."""

    test: Selector[bool]
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...] = ()

    def __init__(self, test: Selector[bool], *body: Node, otherwise: "Node | Sequence[Node]" = ()) -> None:
        object.__setattr__(self, "test", test)
        object.__setattr__(self, "body", body)
        object.__setattr__(
            self, "otherwise", tuple(otherwise) if isinstance(otherwise, (list, tuple)) else (otherwise,)
        )


@dataclass(frozen=True, init=False)
class Parallel:
    """Runs its branches concurrently; each reads the state at the fork and writes into a copy; all are awaited.

    Args:
        branches: a node, or a sequence of nodes that run one after the other.
        limit: how many branches run at a time; None: all.
        on_error: ``halt`` cancels the other branches at the first failure and raises it; ``skip`` lets them end and
            goes on without what the failed branch would have written.
    """

    branches: tuple[tuple[Node, ...], ...]
    limit: int | None = None
    on_error: Literal["halt", "skip"] = "halt"

    def __init__(
        self, *branches: "Node | Sequence[Node]", limit: int | None = None, on_error: Literal["halt", "skip"] = "halt"
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError("Parallel(limit=) must be 1 or more")
        split = tuple(tuple(b) if isinstance(b, (list, tuple)) else (b,) for b in branches)
        object.__setattr__(self, "branches", split)
        object.__setattr__(self, "limit", limit)
        object.__setattr__(self, "on_error", on_error)


@dataclass(frozen=True, init=False)
class Stream:
    """Produces concurrently while its body consumes: a loop whose items are made meanwhile.

    ``produce`` runs once per draw, by supervised workers. It sees the state as it was when the stream began, and the
    draw; it writes nothing. What changes meanwhile is reached through a resource. The body runs turn by turn like a
    loop's and reads what was produced under the stream's name.

    Args:
        name: a name that is new where the stream stands.
        produce: a stage without ``writes``.
        body: the nodes of one turn.
        over: gives the feed (``crucible_kitchen.workflow.stream.Feed``): what is drawn, how many at a time, how far
            ahead, and what a turn gets.
        draws: the name under which ``produce`` reads its draw.

    Example::

        Stream("rollouts", rollout, compute_advantages, ppo_update, over=rollout_feed, draws="ticket")
    """

    name: str
    produce: "Stage[..., Any]"
    over: Selector[Any]
    draws: str
    body: tuple[Node, ...]

    def __init__(
        self, name: str, produce: "Stage[..., Any]", *body: Node, over: Selector[Any], draws: str = "draw"
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "produce", produce)
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "over", over)
        object.__setattr__(self, "draws", draws)


@dataclass(frozen=True, init=False)
class Workflow:
    """How training runs: a named tree with the config it is driven by.

    Args:
        name: in paths, events and on the command line.
        body: the nodes, run in order.
        config: the class of its config.
        returns: the names that an outer workflow sees when this one is nested in it.
        description: one line for people.
        config_field: the field of the outer workflow's config that it takes its own from, when nested; see :meth:`at`.

    Example::

        evaluate_only = Workflow("evaluate_only", load_dataset, init_session, evaluate, config=SupervisedConfig)
        patient = supervised.replace("train_step", train_step.with_(retry=Retry(attempts=5)))
    """

    name: str
    body: tuple[Node, ...]
    config: type[RunConfig] = RunConfig
    returns: tuple[str, ...] = ()
    description: str = ""
    config_field: str | None = field(default=None, kw_only=True)

    def __init__(
        self,
        name: str,
        *body: Node,
        config: type[RunConfig] = RunConfig,
        returns: Sequence[str] = (),
        description: str = "",
        config_field: str | None = None,
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "returns", tuple(returns))
        object.__setattr__(self, "description", description)
        object.__setattr__(self, "config_field", config_field)

    def at(self, config_field: str) -> "Workflow":
        """Return a copy whose config, when nested, is this field of the outer config."""
        return _copy(self, config_field=config_field)

    def with_(self, *, name: str | None = None, description: str | None = None) -> "Workflow":
        """Return a copy under another name or description."""
        return _copy(self, name=name or self.name, description=description or self.description)

    def replace(self, target: str, *nodes: Node) -> "Workflow":
        """Return a copy with other nodes in place of the target.

        Args:
            target: a node's name (every node of that name), or its path below the workflow, ``"epoch/batch/evaluate"``.
            nodes: what takes its place.

        Raises:
            LookupError: nothing has this name or path.
        """
        return self._edit(target, lambda _node: nodes)

    def insert_after(self, target: str, *nodes: Node) -> "Workflow":
        """Return a copy with nodes added after the target; see :meth:`replace`."""
        return self._edit(target, lambda node: (node, *nodes))

    def without(self, target: str) -> "Workflow":
        """Return a copy without the target; see :meth:`replace`."""
        return self._edit(target, lambda _node: ())

    def _edit(self, target: str, change: Callable[[Node], tuple[Node, ...]]) -> "Workflow":
        hits = 0

        def visit(nodes: tuple[Node, ...], prefix: str) -> tuple[Node, ...]:
            nonlocal hits
            result: list[Node] = []
            for node in nodes:
                name = getattr(node, "name", "")
                path = prefix + name
                if name and target in (name, path):
                    hits += 1
                    result.extend(change(node))
                else:
                    result.append(_map_children(node, visit, f"{path}/" if name else prefix))
            return tuple(result)

        body = visit(self.body, "")
        if not hits:
            names = sorted({path.partition("/")[2] for path, _ in walk(self)} - {""})
            raise LookupError(f"nothing in {self.name!r} is called {target!r}; there are {', '.join(names)}")
        return _copy(self, body=body)


def _copy(node: N, **changes: Any) -> N:
    """Copy a frozen node with other fields; its constructor takes the body apart, so fields are set directly."""
    new = object.__new__(type(node))
    for name in (f.name for f in fields(node)):
        object.__setattr__(new, name, changes.get(name, getattr(node, name)))
    return new


Visit: TypeAlias = Callable[[tuple[Node, ...], str], tuple[Node, ...]]


def _map_children(node: Node, visit: Visit, prefix: str) -> Node:
    """Return the node with every block of its children passed through ``visit``."""
    if isinstance(node, Loop):
        return _copy(node, body=visit(node.body, prefix))
    if isinstance(node, Workflow):
        return _copy(node, body=visit(node.body, prefix))
    if isinstance(node, Stream):
        made = visit((node.produce,), prefix)
        if len(made) != 1 or not isinstance(made[0], Stage):
            raise LookupError(f"the stream {node.name!r} is produced by one stage; replace it by one stage")
        return _copy(node, produce=made[0], body=visit(node.body, prefix))
    if isinstance(node, When):
        return _copy(node, body=visit(node.body, prefix), otherwise=visit(node.otherwise, prefix))
    if isinstance(node, Parallel):
        branches = tuple(visit(branch, prefix) for branch in node.branches)
        return _copy(node, branches=tuple(branch for branch in branches if branch))
    return node


def children(node: Node) -> tuple[Node, ...]:
    """Return a control node's children, all blocks together; a stage has none."""
    if isinstance(node, (Loop, Workflow)):
        return node.body
    if isinstance(node, Stream):
        return (node.produce, *node.body)
    if isinstance(node, When):
        return node.body + node.otherwise
    if isinstance(node, Parallel):
        return tuple(n for branch in node.branches for n in branch)
    return ()


def walk(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """Yield (path, node) for a node and all below it, in order; ``When`` and ``Parallel`` do not stand in paths."""
    name = getattr(node, "name", "")
    path = f"{prefix}/{name}" if prefix and name else (name or prefix)
    yield path, node
    for child in children(node):
        yield from walk(child, path)


def steps(node: Node) -> Iterator[tuple[str, Step]]:
    """Yield (path, stage or resource) for all below a node."""
    for path, child in walk(node):
        if isinstance(child, Step):
            yield path, child
