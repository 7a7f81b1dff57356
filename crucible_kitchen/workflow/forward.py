"""The way from a session's opening to a checkpoint's place: what is passed over, opened again, or gone into.

Pure questions about one checkpoint; the walk itself is the engine's. Read next:
``crucible_kitchen.workflow.checkpoints``.
"""

import re
from collections.abc import Mapping
from typing import Any

from crucible_kitchen.errors import ReplayMismatch
from crucible_kitchen.types import Json, JsonObject
from crucible_kitchen.workflow.frame import Frame, Origin
from crucible_kitchen.workflow.memory import Saved
from crucible_kitchen.workflow.nodes import Node, When
from crucible_kitchen.workflow.values import from_json

__all__ = ["Forward", "decoded", "static"]

_TURN = re.compile(r"\[\d+\]")


def static(path: str) -> str:
    """Return a path without the loops' turns: where its node stands in the tree."""
    return _TURN.sub("", path)


class Forward:
    """One checkpoint that the walk goes forward to.

    Stages before its place are done and passed over; resources that were open there are opened again; loops and nested
    workflows around it are entered at their turn. ``reached`` is set at the place itself, and everything runs again.

    Args:
        saved: the checkpoint.
        types: the declared type of what each stage writes, by its path without turns.
    """

    def __init__(self, saved: Saved, types: Mapping[str, Any]) -> None:
        self.saved = saved
        self.reached = False
        self._types = types
        self._goals = (saved.place, *saved.data["live"])

    def wants(self, node: Node, prefix: str) -> bool:
        """Return whether the walk has to visit a node on its way."""
        if isinstance(node, When):
            return self.side(node, prefix) is not None
        name = getattr(node, "name", None)
        if name is None:  # a Parallel is passed over: no checkpoint stands inside
            return False
        path = f"{prefix}/{name}"
        return any(goal == path or goal.startswith((f"{path}/", f"{path}[")) for goal in self._goals)

    def side(self, node: When, prefix: str) -> tuple[Node, ...] | None:
        """Return the side of a ``When`` that was taken, as far as anything of it matters."""
        for side in (node.body, node.otherwise):
            if any(self.wants(child, prefix) for child in side):
                return side
        return None

    def passed(self, path: str) -> None:
        """Note that the walk stands after the node of this path."""
        if path == self.saved.place:
            self.reached = True

    def turn(self, path: str) -> tuple[int, Json]:
        """Return the turn at which a loop goes on, and where its items stood before that turn's."""
        loop = self.saved.data["loops"][path]
        return loop["index"], loop["position"]

    def reads(self, path: str) -> dict[str, Any]:
        """Return what a loop or a resource read when it was entered, where that has changed since."""
        return {
            name: value for name, (value, _) in decoded(self.saved.data["reads"].get(path, {}), self._types).items()
        }

    def restore(self, frame: Frame) -> None:
        """Put the state that a frame had at the checkpoint into it.

        What the frame has already is left as it is: a branch is told from the state at its fork by identity.

        Raises:
            ReplayMismatch: it cannot be read back.
        """
        for name, (value, origin) in decoded(self.saved.data["values"].get(frame.base, {}), self._types).items():
            known = frame.origins.get(name)
            if known is None or known.writer != origin.writer or frame.values[name] != value:
                frame.write(name, value, origin)


def decoded(entries: Mapping[str, JsonObject], types: Mapping[str, Any]) -> dict[str, tuple[Any, Origin]]:
    """Return values that were kept as ``{name: {"writer", "hash", "value"}}``, with their origins.

    Raises:
        ReplayMismatch: a value does not fit the type that its stage declares, or the stage is gone.
    """
    found = {}
    for name, entry in entries.items():
        writer = entry["writer"]
        try:
            value = from_json(entry["value"], types[writer])
        except (KeyError, TypeError) as error:
            raise ReplayMismatch(
                f"what {writer} wrote as {name!r} cannot be read back: {error}",
                hint="the workflow has changed since: start a new run",
            ) from error
        found[name] = (value, Origin(entry["hash"], writer))
    return found
