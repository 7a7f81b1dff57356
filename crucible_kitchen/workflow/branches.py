"""The branches of one ``Parallel``: really concurrent, joined when all have ended, the first failure in time first.

It knows how branches fail and join, not what runs in them. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.workflow.failures import note
from crucible_kitchen.workflow.frame import Frame
from crucible_kitchen.workflow.nodes import Node, Parallel

__all__ = ["Branches"]


class Branches:
    """One run of the branches of a ``Parallel``.

    Args:
        node: the branches.
        frame: where they part; each gets a copy of its state.
        body: runs one branch.
    """

    def __init__(self, node: Parallel, frame: Frame, body: Callable[[Sequence[Node], Frame], Awaitable[None]]) -> None:
        self._node = node
        self._frame = frame
        self._body = body
        self._halt = node.on_error == "halt"
        self._failures: list[Exception] = []
        self._asides: list[str] = []
        self._joined: list[Frame] = []
        self._slots = anyio.CapacityLimiter(node.limit or max(1, len(node.branches)))
        self._group: anyio.abc.TaskGroup

    async def run(self) -> None:
        """Run them all and join their states.

        Raises:
            Exception: with ``on_error="halt"``, the first failure, once all branches have ended; the others are noted.
        """
        try:
            async with anyio.create_task_group() as self._group:
                for nodes in self._node.branches:
                    fork = self._frame.fork()
                    fork.failed = self._failed
                    self._group.start_soon(self._branch, nodes, fork)
        except anyio.get_cancelled_exc_class():
            if not (self._halt and self._failures):  # what failed before the cancellation came is what is reported
                raise
        if self._halt and self._failures:
            first, *others = self._failures
            note(first, others)
            for line in self._asides:
                first.add_note(line)
            raise first
        _join(self._frame.values, [fork.values for fork in self._joined])

    async def _branch(self, nodes: Sequence[Node], fork: Frame) -> None:
        try:
            async with self._slots:
                await self._body(nodes, fork)
            self._joined.append(fork)
        except anyio.get_cancelled_exc_class() as cancelled:
            self._asides += getattr(cancelled, "__notes__", ())  # what failed while this branch was closed
            raise
        except Exception as error:  # noqa: BLE001 - the first is raised after the join, the rest noted
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Hear of a failure, perhaps before the branch has cleaned up, and once more when it has."""
        if any(error is known for known in self._failures):
            return
        self._failures.append(error)
        if self._halt:
            self._group.cancel_scope.cancel()
            if self._frame.failed is not None:
                self._frame.failed(error)


def _join(values: dict[str, Any], branches: Sequence[Mapping[str, Any]]) -> None:
    """Take over what branches wrote into their copies; no two wrote the same name."""
    before = dict(values)
    for branch in branches:
        values |= {name: v for name, v in branch.items() if name not in before or before[name] is not v}
