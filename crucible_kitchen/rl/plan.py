"""How many groups a run rolls out and how far ahead, and what its pipeline has to know of a group.

Plain values. Read next: ``crucible_kitchen.rl.pipeline``.
"""

from dataclasses import dataclass
from typing import Protocol

from crucible_kitchen.rl.staleness import StalenessPolicy
from crucible_kitchen.rl.trajectories import Ticket
from crucible_kitchen.types import Array, JsonObject

__all__ = ["PipelinePlan", "Rolled"]


class Rolled(Protocol):
    """What the pipeline knows of a group; ``TrajectoryGroup`` fulfils it."""

    @property
    def ticket(self) -> Ticket:
        """Which problem."""
        ...

    @property
    def unusable(self) -> str | None:
        """Why it cannot be trained, or None."""
        ...

    @property
    def length(self) -> int:
        """How much was sampled, in tokens."""
        ...

    @property
    def seconds(self) -> float:
        """What it took."""
        ...

    @property
    def carried(self) -> JsonObject | None:
        """Where it stopped, if the next one goes on from there."""
        ...

    def versions(self) -> Array:
        """Policy versions that sampled it, one per token."""
        ...


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """How many groups, and how far ahead.

    Attributes:
        batches: updates in all.
        per_batch: groups of one update.
        max_staleness: K: updates that may lie between sampling and training, as the policy understands it.
        staleness: what is done about it.
        workers: groups that are rolled out at a time.
        in_order: batches are taken in the order of drawing, not of arrival.
        quarantine_after: env-group actors that a problem may kill before it is dropped.
        seed: of the waits between restarts.
    """

    batches: int
    per_batch: int
    max_staleness: int = 0
    staleness: StalenessPolicy = "aggregate"
    workers: int = 8
    in_order: bool = False
    quarantine_after: int = 2
    seed: int = 0

    @property
    def ahead(self) -> int:
        """Most groups that are drawn and not yet trained: the bound of the queue and all before it."""
        return self.per_batch * (self.max_staleness + 1)
