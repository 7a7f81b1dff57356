"""A vector environment that goes on from one group to the next, and how another one is brought to where it stood.

An environment's state cannot be saved, but it follows from how its episodes began and from the actions since: those are
what a group hands on, as JSON. While the process lives, the environment itself is kept. Read next:
``crucible_kitchen.rl.vector``.
"""

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeAlias

import anyio
import numpy as np

from crucible_kitchen.errors import EnvironmentFault
from crucible_kitchen.ports.environment import EnvironmentGroup, VectorEnvironment
from crucible_kitchen.rl.trajectories import Ticket
from crucible_kitchen.rl.vector import Members
from crucible_kitchen.types import Array, JsonObject

__all__ = ["Place", "Standing"]

Open: TypeAlias = Callable[[Ticket], Awaitable[EnvironmentGroup | VectorEnvironment]]
"""Opens the environment of a ticket."""


@dataclass(slots=True, eq=False)
class Place:
    """An open environment.

    Attributes:
        opened: the ticket that it was opened for.
        members: the environment, and where its members are.
        stopped: what a group that stopped there hands on.
    """

    opened: Ticket
    members: Members
    stopped: JsonObject = field(default_factory=dict)

    def stop(self) -> None:
        """Note where the members are."""
        self.stopped = {
            "index": self.opened.index,
            "problem": self.opened.problem,
            "episodes": self.members.episodes.tolist(),
            "actions": [list(done) for done in self.members.actions],
            "seen": _digest(self.members.observations),
        }


class Standing:
    """Keeps the one environment that goes on. Groups take it one after the other."""

    def __init__(self) -> None:
        self._kept: Place | None = None

    @asynccontextmanager
    async def at(self, ticket: Ticket, open_at: Open) -> AsyncGenerator[Place, None]:
        """Use the environment where ``ticket.carried`` says; without that, a new one.

        It is kept for the next group, unless the block fails: then that one brings a new environment to the same place.

        Args:
            ticket: whose group it is.
            open_at: opens the environment of a ticket.

        Raises:
            EnvironmentFault: it does not do the same again.
        """
        if self._kept is not None and self._kept.stopped is not ticket.carried:
            await self.aclose()
        place, self._kept = self._kept, None
        if place is None:
            place = await _opened(ticket, open_at)
        try:
            yield place
        except BaseException:
            await _close(place.members.group)
            raise
        place.stop()
        self._kept = place

    async def aclose(self) -> None:
        """Close what is kept. Idempotent."""
        place, self._kept = self._kept, None
        if place is not None:
            await _close(place.members.group)


async def _opened(ticket: Ticket, open_at: Open) -> Place:
    carried = ticket.carried
    opened = ticket if carried is None else Ticket(carried["index"], carried["problem"])
    group = await open_at(opened)
    assert isinstance(group, VectorEnvironment), "only vector environments go on"
    try:
        members = await (Members.begin(group) if carried is None else _repeated(group, carried))
    except BaseException:
        await _close(group)
        raise
    return Place(opened, members)


async def _close(group: VectorEnvironment) -> None:
    with anyio.CancelScope(shield=True):
        await group.aclose()


async def _repeated(group: VectorEnvironment, carried: JsonObject) -> Members:
    """Begin the same episodes and take the same actions."""
    members = await Members.begin(group, carried["episodes"])
    for actions in zip_longest(*carried["actions"], fillvalue=-1):
        await members.step(np.array(actions, dtype=np.int64))
    if _digest(members.observations) != carried["seen"]:
        raise EnvironmentFault(
            "the environment does not do the same again: equal seeds and actions led to other observations",
            hint="what follows a reset must depend on its seed and the actions alone; or set horizon=0",
        )
    return members


def _digest(observations: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(observations, dtype=np.float64).tobytes()).hexdigest()
