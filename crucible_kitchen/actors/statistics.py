"""What can be seen of a tree of actors from outside: frozen snapshots. Read next: ``crucible_kitchen.actors.cell``."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["ActorStatistics", "Cause", "Quarantined", "State", "Waiting"]

State: TypeAlias = Literal["starting", "idle", "busy", "stopping", "down", "stopped"]
Cause: TypeAlias = Literal["message", "handler", "reply", "room", "start", "stop", "restart"]


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
class Waiting:
    """One edge of who waits for what.

    Attributes:
        who: path of an actor; empty for a task outside the tree.
        cause: ``message``: its mailbox is empty; ``handler``: its own ``handle`` awaits something; ``reply``, ``room``:
            the reply of ``whom``, room in the mailbox of ``whom``; ``start``, ``stop``: its own hook; ``restart``: the
            end of its back-off.
        whom: path of the actor it waits for; empty if it is none.
        since: when that began, on the event loop's clock.
    """

    who: str
    cause: Cause
    whom: str
    since: float


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
