"""What an actor is: a class that handles one message at a time. It knows nothing of who runs it.

Read next: ``crucible_kitchen.actors.ref`` (talking to one), ``crucible_kitchen.actors.spec`` (having one run).
"""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

__all__ = ["Actor"]

M = TypeVar("M")
R = TypeVar("R")


class Actor(ABC, Generic[M, R]):
    """State that only one task touches: ``handle`` is called for one message at a time, in the order of arrival.

    An exception that leaves ``start`` or ``handle`` is the actor's death: a new instance takes its place and handles
    the same message again, until the message is quarantined. An expected failure is therefore no exception but a value
    of the reply type. What must not happen twice needs a key in the message, or ``quarantine_after=1``.

    ``start``, ``handle`` and ``stop`` of one incarnation run in one task. A task group may be opened within a call, and
    is closed in it.

    Example::

        class Counter(Actor[int, int]):
            def __init__(self) -> None:
                self.total = 0

            async def handle(self, message: int) -> int:
                self.total += message
                return self.total
    """

    async def start(self) -> None:
        """Open what the actor needs, before its first message."""

    @abstractmethod
    async def handle(self, message: M) -> R:
        """Handle one message and return the reply."""

    async def stop(self) -> None:
        """Close what ``start`` opened; called once per incarnation, however it ended, also after ``start`` failed.

        Shielded from cancellation for ``grace`` seconds.
        """
