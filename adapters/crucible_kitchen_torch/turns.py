"""Long computations in short turns: between two turns the lane serves others, and a cancelled call ends.

Knows lanes, not what is computed. Read next: ``crucible_kitchen.workers``.
"""

from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from crucible_kitchen.workers import Lane
from crucible_kitchen_torch.faults import torch_errors

__all__ = ["Turns"]

P = ParamSpec("P")
R = TypeVar("R")


class Turns:
    """A lane whose functions raise errors of our tree only."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def wanted(self) -> bool:
        """Whether somebody else waits for the lane."""
        return self._lane.wanted

    async def one(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function as one turn."""

        def guarded() -> R:
            with torch_errors():
                return fn(*args, **kwargs)

        return await self._lane.run(guarded)

    async def all(self, start: Callable[[], Iterator[R | None]], check: Callable[[], None] = lambda: None) -> R:
        """Run a generator, one turn each time it yields, and return the first thing that it yields: its result.

        Args:
            start: makes the generator; called in the lane.
            check: called before each turn; what it raises ends the computation.
        """
        check()

        def begin() -> tuple[Iterator[R | None], R | None]:
            turns = start()
            return turns, next(turns)

        turns, result = await self.one(begin)
        while result is None:
            check()
            result = await self.one(next, turns)
        return result
