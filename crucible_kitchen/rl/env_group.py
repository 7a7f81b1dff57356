"""An env group as an actor: it is given one problem at a time, and what it cannot explain kills it.

It knows neither queue nor learner. Read next: ``crucible_kitchen.rl.pipeline``, which supervises it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import anyio

from crucible_kitchen.actors import Actor, Restarts
from crucible_kitchen.rl.trajectories import Ticket

__all__ = ["RESTARTS", "EnvGroup", "Fatal", "Job", "Produce"]

G = TypeVar("G")
Produce: TypeAlias = Callable[[Ticket], Awaitable[G]]

RESTARTS = Restarts(most=1000, within=60.0, initial=0.005, factor=2.0, longest=0.05)
"""Env groups may die often: what gives up is the count of problems that came to nothing in a row."""


@dataclass(slots=True, eq=False)
class Job:
    """A ticket on its way."""

    ticket: Ticket
    version: int
    scope: anyio.CancelScope | None = None
    began: float = 0.0


@dataclass(frozen=True, slots=True)
class Fatal:
    """What no other rollout would be spared: it ends the run."""

    error: Exception


class EnvGroup(Actor[Job, Any]):
    """One env group at a time. What it cannot explain kills it; the next one is given the same problem again."""

    def __init__(self, produce: Produce[Any], fatal: tuple[type[Exception], ...]) -> None:
        self._produce = produce
        self._fatal = fatal

    async def handle(self, message: Job) -> Any:
        """Roll out one problem; None if it was cancelled for being too old."""
        try:
            if message.scope is None:
                return await self._produce(message.ticket)
            with message.scope:
                return await self._produce(message.ticket)
        except self._fatal as error:
            return Fatal(error)
        return None
