"""What is known of names at a place in a workflow, and how that changes where paths part and join.

It reports nothing; it knows no node but what a loop's later stages write. Read next:
``crucible_kitchen.workflow.check``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from crucible_kitchen.config import RunConfig
from crucible_kitchen.workflow.nodes import Loop, Node, Stream, Workflow, children
from crucible_kitchen.workflow.stage import Stage
from crucible_kitchen.workflow.typing import fits

__all__ = ["Known", "Scope", "join", "written_in"]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a name at a place.

    Attributes:
        type: its declared type.
        definite: every path to this place wrote it.
        writer: path of the stage that wrote it.
        item: it is the item of the loop ``writer``.
        live: it is an open resource.
    """

    type: Any
    definite: bool
    writer: str
    item: bool = False
    live: bool = False


@dataclass
class Scope:
    """The names visible at a place.

    Attributes:
        later: names that stages further down in an enclosing loop's body write.
        closed: resources that are gone, and with which block.
        depth: how many loops are around.
        inherited: names that were there when the state was copied for a branch or a nested workflow; a resource may
            take such a name for itself.
    """

    config: type[RunConfig]
    names: dict[str, Known] = field(default_factory=dict)
    later: dict[str, Known] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    depth: int = 0
    inherited: frozenset[str] = frozenset()

    def fork(self) -> "Scope":
        """Return a copy for another path through the same state."""
        return replace(self, names=dict(self.names), later=dict(self.later), closed=dict(self.closed))

    def copy_of_state(self) -> "Scope":
        """Return a copy for a branch or a nested workflow, which has a state of its own."""
        return replace(self.fork(), inherited=frozenset(self.names))

    def close(self, resources: Sequence[str], path: str) -> None:
        """Forget the resources of a block that ends."""
        for name in resources:
            self.names.pop(name, None)
            self.closed[name] = path


def join(scope: Scope, one: Scope, other: Scope) -> list[str]:
    """Merge two paths into ``scope``: definite is what both wrote, maybe what one wrote.

    Returns:
        the names that the two paths leave with types that do not fit.
    """
    joined, clashes = dict[str, Known](), list[str]()
    for name in one.names.keys() | other.names.keys():
        a, b = one.names.get(name), other.names.get(name)
        if a is None or b is None:
            known = a or b
            assert known is not None
            joined[name] = replace(known, definite=False)
        elif a is b:
            joined[name] = a
        else:
            wide, ok = (b, True) if fits(a.type, b.type) else (a, fits(b.type, a.type))
            joined[name] = replace(wide, definite=a.definite and b.definite, live=a.live or b.live)
            clashes += [] if ok else [name]
    scope.names = joined
    scope.closed = one.closed | other.closed
    scope.inherited = one.inherited & other.inherited
    return clashes


def written_in(nodes: Sequence[Node], prefix: str) -> Iterator[tuple[str, Known]]:
    """Yield what stages below write and a later turn of the loop around them can still see."""
    for node in nodes:
        name = getattr(node, "name", "")
        path = f"{prefix}/{name}" if name else prefix
        if isinstance(node, Stage):
            if node.writes:
                yield node.writes, Known(node.write_type, definite=False, writer=path)
        elif isinstance(node, Workflow):
            inner = dict(written_in(node.body, path))
            yield from ((n, inner.get(n, Known(Any, definite=False, writer=path))) for n in node.returns)
        else:
            yield from written_in(children(node), path if isinstance(node, (Loop, Stream)) else prefix)
