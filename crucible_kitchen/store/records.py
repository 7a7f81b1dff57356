"""What the run store keeps, as values: runs, attempts and their leases, stages' records, checkpoints.

It knows no store. Read next: ``crucible_kitchen.store.base``.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from crucible_kitchen.errors import IntegrityError
from crucible_kitchen.store.owner import Owner
from crucible_kitchen.types import Json, JsonObject

__all__ = ["Attempt", "Checkpoint", "FinalStatus", "Lease", "RunRecord", "RunStatus", "StageRecord"]

RunStatus: TypeAlias = Literal["running", "completed", "failed", "cancelled", "paused", "crashed"]
FinalStatus: TypeAlias = Literal["completed", "failed", "cancelled", "paused", "crashed"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as the store keeps it.

    Attributes:
        run_id: the run's id, unique in the store.
        workflow: the workflow's or recipe's name.
        status: that of its last attempt.
        config: the resolved config, JSON.
        config_hash: sha256 of the config's canonical JSON.
        created_at: seconds since the epoch, UTC.
        finished_at: the same, or None while it runs.
        result: what it gave (metrics, the part of its state that is JSON); None while it runs.
        error: the error that ended it (code, message, where, hint); None where there was none.
    """

    run_id: str
    workflow: str
    status: RunStatus = "running"
    config: JsonObject = field(default_factory=dict)
    config_hash: str = ""
    created_at: float = 0.0
    finished_at: float | None = None
    result: JsonObject | None = None
    error: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a run, from its opening to its end.

    Attributes:
        run_id: the run.
        number: counts from 1 within the run; it is the epoch of the attempt's lease.
        owner: the process it belongs to.
        started_at: seconds since the epoch, UTC.
        seq: the last record of the run's log when it was opened: its own records come after.
        ended_at: like ``started_at``; None while it has no end.
        status: ``running`` until it ends; ``crashed`` where it was found without an owner.
        error: the error that ended it; None where there was none.
    """

    run_id: str
    number: int
    owner: Owner
    started_at: float
    seq: int = 0
    ended_at: float | None = None
    status: RunStatus = "running"
    error: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to a run, which one attempt has at a time.

    Attributes:
        run_id: the run.
        epoch: number of the attempt that has it; a write of any other epoch is refused.
        until: when it ends unless it is renewed, in seconds since the epoch, UTC; from then on others may take it.
        seq: the last durable record of the run's log when the attempt was opened.
    """

    run_id: str
    epoch: int
    until: float
    seq: int


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage that ended gave, under its place in the tree.

    Attributes:
        run_id: the run.
        path: the stage's path.
        input_hash: sha256 of what it read.
        output_hash: sha256 of what it gave.
        value: what it gave, JSON; it must not be changed afterwards.
        seq: the last event of the run that was emitted before it.
    """

    run_id: str
    path: str
    input_hash: str
    output_hash: str
    value: Json
    seq: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place to resume a run from: where in the tree, and what was true there.

    Attributes:
        run_id: the run.
        number: counts 1, 2, 3 within the run; it is taken once.
        session: path of the resource that opened the training session.
        place: path of the stage after which it stands.
        step: the optimizer step it stands at.
        epoch: number of the attempt that took it.
        seq: the last event of the run that it covers.
        created_at: seconds since the epoch, UTC.
        data: the folded state and whatever else the engine needs, JSON.
        states: the backend's references to its saved states, JSON.
        sha256: digest of all of the above; the store fills it in.
        damaged: what was read does not match its digest.
    """

    run_id: str
    number: int
    session: str
    place: str
    step: int
    epoch: int
    seq: int
    created_at: float
    data: JsonObject = field(default_factory=dict)
    states: JsonObject = field(default_factory=dict)
    sha256: str = ""
    damaged: bool = False

    def digest(self) -> str:
        """Return the sha256 of its content as canonical JSON."""
        content = {name: getattr(self, name) for name in self.__slots__ if name not in ("sha256", "damaged")}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def verify(self) -> None:
        """Check that it is what was written.

        Raises:
            IntegrityError: it is damaged; an earlier one may be whole.
        """
        if self.damaged:
            raise IntegrityError(
                f"checkpoint {self.number} of run {self.run_id!r} is damaged: its content does not match its sha256",
                hint="resume from the one before",
            )
