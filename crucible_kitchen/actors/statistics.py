"""What can be seen of a tree of actors from outside: frozen snapshots. Read next: ``crucible_kitchen.actors.cell``."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["ActorStatistics", "Quarantined", "State"]

State: TypeAlias = Literal["starting", "idle", "busy", "stopping", "down", "stopped"]


@dataclass(frozen=True, slots=True)
class ActorStatistics:
    """One actor at one moment.

    Attributes:
        path: its supervisors' names and its own.
        state: ``down`` while it waits to be restarted, ``stopped`` once it never will be.
        epoch: how many incarnations it has had.
        depth: messages in its mailbox.
        waiting: senders that wait for room there.
        handled: messages handled to their end.
        restarts: incarnations after the first.
        quarantined: messages that are not delivered again.
        stale: replies of older incarnations that were dropped.
        last_error: what it died of last.
        busy_since: when it took the message it has in hand, on the event loop's clock; None if it has none.
    """

    path: str
    state: State
    epoch: int
    depth: int
    waiting: int
    handled: int
    restarts: int
    quarantined: int
    stale: int
    last_error: Exception | None
    busy_since: float | None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A message that is not delivered again.

    Attributes:
        path: the actor that it killed.
        message: the message itself.
        deaths: how often.
        error: what the actor died of the last time.
    """

    path: str
    message: Any
    deaths: int
    error: Exception
