"""Where the walk through a workflow is: the state it sees, its path and turns, and the block whose resources are open.

Plain data of the engine. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import anyio

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import StageFailed
from crucible_kitchen.ports import TrainingSession
from crucible_kitchen.types import Json
from crucible_kitchen.waits import waiting
from crucible_kitchen.workflow.binding import binder_of
from crucible_kitchen.workflow.failures import as_ours
from crucible_kitchen.workflow.nodes import Node, Positioned, When
from crucible_kitchen.workflow.resources import LiveResource
from crucible_kitchen.workflow.stage import Resource
from crucible_kitchen.workflow.stream import Feed

if TYPE_CHECKING:
    from crucible_kitchen.workflow.forward import Forward

__all__ = ["Block", "Frame", "Live", "OpenLoop", "OpenSession", "Origin", "each", "opens_resources"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value of the state came from.

    Attributes:
        hash: stands for the value in the input hashes of those who read it.
        writer: path, without turns, of the stage that wrote it; None for live resources and items of loops, which
            are made again and not recorded.
    """

    hash: str
    writer: str | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """One open resource, and the recordable values that it read when it was opened."""

    step: Resource[..., Any]
    path: str
    resource: LiveResource
    reads: Mapping[str, Any]


@dataclass(slots=True)
class OpenLoop:
    """One loop that the walk is inside of.

    Attributes:
        path: its place, without its own turn.
        reads: the recordable values that ``over`` read.
        index: the current turn.
        position: where a ``Positioned`` stood before it gave the current item.
        feed: of a stream, which moves within a turn.
    """

    path: str
    reads: Mapping[str, Any]
    index: int = 0
    position: Json = None
    feed: Feed | None = None

    def now(self) -> Json:
        """Return the position that a checkpoint taken now goes on from."""
        return self.position if self.feed is None else self.feed.position()


@dataclass(slots=True)
class Block:
    """The lifetime of resources: the workflow, a loop's turn, or a branch.

    ``failures`` are in the order of time: the first is the one that the block raises, unless it is ``muted``: it was
    cancelled before anything failed. ``outer`` is the block around it, in the same branch.
    """

    outer: "Block | None" = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    live: list[Live] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    muted: bool = False


@dataclass(slots=True)
class Frame:
    """Where the walk is.

    Attributes:
        values: the state, by name.
        base: the prefix at which this frame began: of the workflow, or of the nested one it walks.
        behind: stages do not wait for their records.
        origins: where each value came from.
        sessions: the open sessions whose record is the checkpoint, the outermost first.
        loops: the loops around this place.
        block: the block whose resources are open, if it opens any.
        failed: told of a failure at once, before clean-up, by whoever stands below a ``Parallel``.
        outer: the frame that this one was forked from.
        forward: the checkpoint's place that the walk is on its way to, after it has loaded one.
        fenced: a session is open that other branches use too: no checkpoint can be taken here.
        depth: how many branches this one stands inside of.
    """

    values: dict[str, Any]
    config: RunConfig
    prefix: str
    turns: dict[str, int]
    behind: bool
    base: str = ""
    origins: dict[str, Origin] = field(default_factory=dict)
    sessions: "tuple[OpenSession, ...]" = ()
    loops: list[OpenLoop] = field(default_factory=list)
    block: Block | None = None
    failed: Callable[[Exception], None] | None = None
    outer: "Frame | None" = None
    forward: "Forward | None" = None
    fenced: bool = False
    depth: int = 0

    def fork(self) -> "Frame":
        """Return a frame that sees this state and writes into a copy."""
        return replace(
            self,
            values=dict(self.values),
            origins=dict(self.origins),
            loops=list(self.loops),
            base=self.prefix,
            outer=self,
        )

    def branch(self) -> "Frame":
        """Return a fork for a branch of a ``Parallel``, which others run beside."""
        return replace(self.fork(), fenced=bool(self.sessions), depth=self.depth + 1)

    def fail(self, block: Block, error: Exception) -> None:
        """Put a failure down in the order of time."""
        block.failures.append(error)
        if self.failed is not None and not block.muted:
            self.failed(error)

    def read_by(self, fn: Callable[..., Any]) -> dict[str, Any]:
        """Return the recordable values that a function reads here."""
        names = binder_of(fn).names
        return {n: self.values[n] for n in names if n in self.origins and self.origins[n].writer is not None}

    def write(self, name: str, value: Any, origin: Origin) -> None:
        """Put a value into the state."""
        self.values[name] = value
        self.origins[name] = origin

    def drop(self, name: str) -> None:
        """Take a value out of the state."""
        self.values.pop(name, None)
        self.origins.pop(name, None)

    def seeking(self) -> "Forward | None":
        """Return what the walk is on its way to, or None where it runs."""
        return self.forward if self.forward is not None and not self.forward.reached else None


@dataclass(slots=True, eq=False)
class OpenSession:
    """A session whose record is the checkpoint, while it is open.

    Attributes:
        path: of the resource that opened it.
        session: the session.
        frame: in which it was opened.
        block: in which it was opened; a checkpoint covers this block.
        opened_at: its position when it was opened.
        written: set when no checkpoint of it is being written.
    """

    path: str
    session: TrainingSession
    frame: Frame
    block: Block
    opened_at: int
    written: anyio.Event | None = None


def opens_resources(nodes: Sequence[Node]) -> bool:
    """Return whether a block itself opens resources: those in loops, branches and nested workflows have their own."""
    for node in nodes:
        if isinstance(node, Resource):
            return True
        if isinstance(node, When) and (opens_resources(node.body) or opens_resources(node.otherwise)):
            return True
    return False


def each(items: Any, path: str, start: int = 0, position: Json = None) -> AsyncGenerator[tuple[Json, Any], None]:
    """Iterate over what a loop's ``over`` gave, each item with the position before it; close it with ``aclose``.

    Args:
        items: a Sequence, a range or a ``Positioned``.
        path: the loop's.
        start: index of the first item that is asked for.
        position: where a ``Positioned`` stood before that item.

    Raises:
        CrucibleError: it cannot be iterated over and resumed, or failed to give an item; with the loop's path.
    """
    if isinstance(items, Positioned):
        return _positioned(items, path, position)
    if isinstance(items, Mapping) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        hint = "give a Sequence, a range or a Positioned"
        raise StageFailed(f"cannot loop over a {type(items).__name__}", hint=hint, where=path)
    return _indexed(items, path, start)


async def _indexed(items: Any, path: str, start: int) -> AsyncGenerator[tuple[Json, Any], None]:
    for index in range(start, len(items)):
        try:
            item = items[index]
        except Exception as error:  # noqa: BLE001 - user code; raised again with its place
            raise as_ours(error, path)  # noqa: B904 - as_ours has set the cause
        yield None, item


async def _positioned(items: Positioned[Any], path: str, position: Json) -> AsyncGenerator[tuple[Json, Any], None]:
    try:
        if position is not None:
            items.seek(position)
        iterator = aiter(items)
    except Exception as error:  # noqa: BLE001 - user code; raised again with its place
        raise as_ours(error, path)  # noqa: B904 - as_ours has set the cause
    try:
        while True:
            try:
                before = items.position()
                with waiting("item", path):
                    item = await anext(iterator)
            except StopAsyncIteration:
                return
            except Exception as error:  # noqa: BLE001 - user code; raised again with its place
                raise as_ours(error, path)  # noqa: B904 - as_ours has set the cause
            yield before, item
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            with anyio.CancelScope(shield=True):
                await close()
