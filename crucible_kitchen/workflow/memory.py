"""What a run remembers of its earlier attempts: records of stages, and checkpoints of sessions.

The engine reads and writes it through :class:`Memory`; where it is kept is not the engine's business. Read next:
``crucible_kitchen.workflow.records`` and ``.checkpoints``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from crucible_kitchen.types import JsonObject, StateRef

__all__ = ["Keep", "Made", "Memory", "Recorded", "Saved"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A stage, or a session's whole block, that is done and need not run again.

    Attributes:
        path: its place with the loops' turns.
        input_hash: of what it read: ``<config>:<state>``, both parts hex.
        output_hash: sha256 of what it wrote, hex; stands for it in the input hashes of others.
        value: what it wrote, measured and made, as JSON.
    """

    path: str
    input_hash: str
    output_hash: str
    value: JsonObject


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint: everything that is needed to go on after one stage.

    Attributes:
        number: counts from 1 within the run.
        session: path of the resource that opened the outermost session it covers.
        place: path of the stage after which it stands.
        step: optimizer steps of that session.
        data: the state that the stages wrote, live resources, open loops, measurements, artifacts; JSON.
        states: the saved state of each session that had moved, by the path of its resource.
        seq: place in the run's log: what came after it is superseded when the run returns here.
    """

    number: int
    session: str
    place: str
    step: int
    data: JsonObject
    states: Mapping[str, StateRef]
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints stay when a new one was written.

    Attributes:
        last: so many newest ones; at least 1.
        every: those whose step is a multiple; 0: none for that reason.
        best: so many with the highest score; 0: none for that reason.
        score: of the checkpoint that is asked for, if it was measured.
    """

    last: int = 2
    every: int = 0
    best: int = 0
    score: float | None = None


@dataclass(slots=True)
class Made:
    """What one try of a stage left besides its value: measurements, artifacts, the wish for a checkpoint."""

    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: list[JsonObject] = field(default_factory=list)
    checkpoint: Keep | None = None


class Memory(Protocol):
    """Where records and checkpoints of one run are kept.

    Guarantees: what ``record`` was given is durable no later than the event that is emitted next; what ``keep`` was
    given is durable when it returns, and so is everything emitted or recorded before it.
    """

    @property
    def attempt(self) -> int:
        """Which attempt of the run this is, from 1."""
        ...

    @property
    def seq(self) -> int:
        """The place in the run's log of what was emitted last."""
        ...

    def recall(self, path: str) -> Recorded | None:
        """Return what is recorded of a place, or None."""
        ...

    def record(self, recorded: Recorded) -> None:
        """Keep a record; never blocks."""
        ...

    def checkpoints(self, session: str | None = None) -> Sequence[Saved]:
        """Return a session's checkpoints, or all of the run's, the newest first."""
        ...

    async def keep(self, saved: Saved) -> None:
        """Keep a checkpoint."""
        ...

    async def forget(self, saved: Saved) -> None:
        """Keep a checkpoint no longer."""
        ...
