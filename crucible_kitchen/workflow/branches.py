"""The branches of one ``Parallel``: really concurrent, joined when all have ended, the first failure in time first.

It knows how branches fail and join, not what runs in them. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.errors import RunPaused
from crucible_kitchen.workflow.failures import note
from crucible_kitchen.workflow.frame import Frame
from crucible_kitchen.workflow.nodes import Node, Parallel, walk

__all__ = ["Branches"]


class Branches:
    """One run of the branches of a ``Parallel``.

    Args:
        node: the branches.
        frame: where they part; each gets a copy of its state.
        body: runs one branch, which is known by a path.
    """

    def __init__(
        self, node: Parallel, frame: Frame, body: Callable[[Sequence[Node], Frame, str], Awaitable[None]]
    ) -> None:
        self._node = node
        self._frame = frame
        self._body = body
        self._halt = node.on_error == "halt"
        self._cancelled = anyio.get_cancelled_exc_class()
        self._failures: list[Exception] = []
        self._paused: RunPaused | None = None
        self._asides: list[str] = []
        self._joined: list[Frame] = []
        self._slots: AbstractAsyncContextManager[Any] = (
            nullcontext() if node.limit is None else anyio.CapacityLimiter(node.limit)
        )
        self._group: anyio.abc.TaskGroup

    async def run(self) -> None:
        """Run them all and join their states.

        Raises:
            Exception: with ``on_error="halt"``, the first failure, once all branches have ended; the others are noted.
        """
        try:
            async with anyio.create_task_group() as self._group:
                for nodes in self._node.branches:
                    fork = self._frame.branch()
                    fork.failed = self._failed
                    self._group.start_soon(self._branch, nodes, fork)
        except self._cancelled:
            if not (self._halt and self._failures):  # what failed before the cancellation came is what is reported
                raise
        if self._halt and self._failures:
            first, *others = self._failures
            note(first, others)
            for line in self._asides:
                first.add_note(line)
            raise first
        if self._paused is not None:
            raise self._paused
        _join(self._frame, self._joined)

    async def _branch(self, nodes: Sequence[Node], fork: Frame) -> None:
        try:
            async with self._slots:
                await self._body(nodes, fork, f"{fork.prefix}/{_name(nodes)}#branch{fork.depth}")
            self._joined.append(fork)
        except self._cancelled as cancelled:
            self._asides += getattr(cancelled, "__notes__", ())  # what failed while this branch was closed
            raise
        except Exception as error:  # noqa: BLE001 - the first is raised after the join, the rest noted
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Hear of a failure, perhaps before the branch has cleaned up, and once more when it has.

        A branch that stopped at its checkpoint is no failure: the others go on to theirs.
        """
        if isinstance(error, RunPaused):
            self._paused = self._paused or error
            return
        if any(error is known for known in self._failures):
            return
        self._failures.append(error)
        if self._halt:
            self._group.cancel_scope.cancel()
            if self._frame.failed is not None:
                self._frame.failed(error)


def _join(frame: Frame, branches: Sequence[Frame]) -> None:
    """Take over what branches wrote into their copies; no two wrote the same name."""
    before = dict(frame.values)
    for branch in branches:
        for name, value in branch.values.items():
            if name not in before or before[name] is not value:
                frame.write(name, value, branch.origins[name])


def _name(nodes: Sequence[Node]) -> str:
    """Return a name that no other branch here has: of its first node that has one."""
    return next((name for node in nodes for _, inner in walk(node) if (name := getattr(inner, "name", ""))), "")
