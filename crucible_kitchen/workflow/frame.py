"""Where the walk through a workflow is: the state it sees, its path and turns, and the block whose resources are open.

Plain data of the engine. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import StageFailed
from crucible_kitchen.waits import waiting
from crucible_kitchen.workflow.failures import as_ours
from crucible_kitchen.workflow.nodes import Node, Positioned, When
from crucible_kitchen.workflow.resources import LiveResource
from crucible_kitchen.workflow.stage import Resource

__all__ = ["Block", "Frame", "each", "opens_resources"]


@dataclass(slots=True)
class Block:
    """The lifetime of resources: the workflow, a loop's turn, or a branch.

    ``failures`` are in the order of time: the first is the one that the block raises, unless it is ``muted``: it was
    cancelled before anything failed.
    """

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    live: list[tuple[Resource[..., Any], str, LiveResource]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    muted: bool = False


@dataclass(slots=True)
class Frame:
    """Where the walk is.

    Attributes:
        values: the state, by name.
        behind: stages do not wait for their records.
        block: the block whose resources are open, if it opens any.
        failed: told of a failure at once, before clean-up, by whoever stands below a ``Parallel``.
    """

    values: dict[str, Any]
    config: RunConfig
    prefix: str
    turns: dict[str, int]
    behind: bool
    block: Block | None = None
    failed: Callable[[Exception], None] | None = None

    def fork(self) -> "Frame":
        """Return a frame that sees this state and writes into a copy."""
        return Frame(dict(self.values), self.config, self.prefix, self.turns, self.behind, self.block, self.failed)

    def fail(self, block: Block, error: Exception) -> None:
        """Put a failure down in the order of time."""
        block.failures.append(error)
        if self.failed is not None and not block.muted:
            self.failed(error)


def opens_resources(nodes: Sequence[Node]) -> bool:
    """Return whether a block itself opens resources: those in loops, branches and nested workflows have their own."""
    for node in nodes:
        if isinstance(node, Resource):
            return True
        if isinstance(node, When) and (opens_resources(node.body) or opens_resources(node.otherwise)):
            return True
    return False


async def each(items: Any, path: str) -> AsyncGenerator[Any, None]:
    """Iterate over what a loop's ``over`` gave; close it with ``aclose``.

    Raises:
        CrucibleError: it cannot be iterated over and resumed, or failed to give an item; with the loop's path.
    """
    if isinstance(items, Positioned):
        iterator = aiter(items)
        try:
            while True:
                try:
                    with waiting("item", path):
                        item = await anext(iterator)
                except StopAsyncIteration:
                    return
                except Exception as error:  # noqa: BLE001 - user code; raised again with its place
                    raise as_ours(error, path)  # noqa: B904 - as_ours has set the cause
                yield item
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                with anyio.CancelScope(shield=True):
                    await close()
    elif isinstance(items, Mapping) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        hint = "give a Sequence, a range or a Positioned"
        raise StageFailed(f"cannot loop over a {type(items).__name__}", hint=hint, where=path)
    else:
        for index in range(len(items)):
            try:
                item = items[index]
            except Exception as error:  # noqa: BLE001 - user code; raised again with its place
                raise as_ours(error, path)  # noqa: B904 - as_ours has set the cause
            yield item
