"""What a ``Stream`` is over: a feed, which draws, has each draw produced, and gives the results out turn by turn.

It knows nothing of what is produced. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

from crucible_kitchen.types import Json

__all__ = ["Feed"]


@runtime_checkable
class Feed(Protocol):
    """Iterating over it gives the item of each turn; the first draw happens when the first turn is asked for.

    Unlike a ``Positioned`` it is asked for its position in the middle of a turn, where a checkpoint is taken, because
    what was drawn since belongs to it.
    """

    def running(
        self, produce: Callable[[Any], Awaitable[Any]], *, warn: Callable[[str, str], object]
    ) -> AbstractAsyncContextManager[Any]:
        """Have ``produce`` called for what is drawn, concurrently, for the length of a block; nothing outlives it."""
        ...

    def __aiter__(self) -> Any:
        """Iterate over the turns."""
        ...

    def position(self) -> Json:
        """Return where it is, also in the middle of a turn."""
        ...

    def seek(self, position: Json) -> None:
        """Go on from there: the turn that was under way comes first. Called before the first turn is asked for."""
        ...
