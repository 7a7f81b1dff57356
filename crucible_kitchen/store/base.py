"""What a run store is: its Protocol, and what it promises.

It knows nothing of who writes the log or reads it, and of no database. Read next: ``crucible_kitchen.store.front``
(the journal's waiting room, shared by both stores), ``.sqlite`` and ``.memory``.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from crucible_kitchen.errors import RunNotFound
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store.owner import Owner
from crucible_kitchen.store.records import (
    Attempt,
    Checkpoint,
    FinalStatus,
    Lease,
    RunRecord,
    RunStatus,
    StageRecord,
)
from crucible_kitchen.types import BlobRef, JsonObject

__all__ = ["TTL", "RunStore", "only_run"]

TTL = 30.0
"""Seconds that a lease lasts unless it is renewed."""


class RunStore(Protocol):
    """Runs: their attempts, logs, stages' records, checkpoints, artifacts and manifests.

    Guarantees:

    - A run's log counts 1, 2, 3 without gaps and never changes once written. What ``flush`` returned for, or
      ``durable`` counts, survives the end of the process; ends and checkpoints survive the machine's.
    - Writes take effect in the order they were asked for, each whole or not at all.
    - One attempt at a time may write to a run. Whatever another one asks for after it was taken over, from this
      process or any other, is refused with ``LeaseLost`` and leaves no trace, whatever its clock says; other runs of
      the same store do not notice.
    - After a failed write every later write, ``flush`` and ``drain`` raises the same error: a run stops rather than
      go on without its log.
    """

    async def open(self) -> None:
        """Open the store, creating or migrating it where needed.

        Raises:
            StoreError: it cannot be opened, or was written by a newer version of this package.
        """
        ...

    async def aclose(self) -> None:
        """Write all that waits, end the leases still held here, then close. Idempotent."""
        ...

    # -- attempts -------------------------------------------------------------------------------------------------

    async def create_run(
        self, record: RunRecord, owner: Owner | None = None, ttl: float = TTL, *, manifest: JsonObject | None = None
    ) -> Lease:
        """Store a new run with its manifest, open its first attempt, and its log for writing, all in one.

        Args:
            record: the run; it is ``running`` from now on.
            owner: the process that the attempt belongs to; unset: this one.
            ttl: seconds that the lease lasts unless it is renewed.
            manifest: what is run, on what; a run without one cannot be resumed.

        Raises:
            Conflict: the id is taken.
        """
        ...

    async def open_attempt(
        self, run_id: str, owner: Owner | None = None, ttl: float = TTL, *, manifest: JsonObject | None = None
    ) -> Lease:
        """Open the next attempt of a run, and its log for writing where it ends.

        An attempt without an end is closed as ``crashed`` first, if its owner is known to be dead or its lease has
        ended. Nothing in between: of two that try at the same time one gets the run. A manifest that is given takes
        the place of the one before.

        Raises:
            RunNotFound: there is no such run.
            RunLive: its lease has not ended, and its owner is not known to be dead.
            RunEnded: it is completed.
        """
        ...

    async def renew(self, lease: Lease, ttl: float = TTL) -> Lease:
        """Make a lease last ``ttl`` seconds from now, never shorter than it did.

        Raises:
            LeaseLost: another attempt has the run, or it was found crashed.
        """
        ...

    async def finish_run(
        self, run_id: str, status: FinalStatus, result: JsonObject, error: JsonObject | None = None
    ) -> None:
        """Record how an attempt and with it its run ended, and give the lease up.

        Everything written before is on the disk itself when this returns.

        Raises:
            RunNotFound: there is no such run.
            RunEnded: it has already ended.
            LeaseLost: another attempt has it.
        """
        ...

    async def attempts(self, run_id: str) -> list[Attempt]:
        """Return a run's attempts, the first one first."""
        ...

    async def reconcile(self) -> list[RunRecord]:
        """Close every attempt without an end that has lost its owner, as ``crashed``.

        It has if its owner is known to be dead or closed its store, or if its lease has ended and its owner is not
        known to live: one that was only late goes on, unless ``open_attempt`` took its run meanwhile. Any number of
        processes may do so at the same time: each run is returned to one of them.
        """
        ...

    async def delete_run(self, run_id: str) -> None:
        """Delete a run and all that is recorded of it; what its artifacts refer to is left alone.

        Raises:
            RunNotFound: there is no such run.
            RunLive: somebody still has it.
        """
        ...

    # -- the log --------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """How many records wait for the writer; above the store's limit a producer awaits ``drain``."""
        ...

    def append(self, records: Sequence[EventRecord]) -> None:
        """Queue records for the log; never blocks. They are durable at most 100 ms later, sooner with ``flush``.

        Raises:
            RunNotFound: the run was neither created nor opened in this store.
            LeaseLost: another attempt has it.
            StoreError: a record does not follow the last one, or an earlier write failed.
        """
        ...

    def record(self, record: StageRecord) -> None:
        """Queue a stage's record, in order with ``append``; never blocks. It replaces an earlier one of its path.

        Raises:
            RunNotFound, LeaseLost, StoreError: as ``append``.
        """
        ...

    async def flush(self, run_id: str, seq: int) -> None:
        """Return when every event of the run up to ``seq``, and every stage's record so far, is durable.

        It hurries the writer.

        Raises:
            LeaseLost: another attempt has the run.
            StorageFull: the disk is full.
            StoreError: a write failed, or ``seq`` was never appended.
        """
        ...

    def durable(self, run_id: str) -> int:
        """Return the last durable seq of a run that is open for writing here; 0 for others."""
        ...

    async def durable_after(self, run_id: str, seq: int) -> int:
        """Wait until a record after ``seq`` is durable and return the last durable seq; does not hurry the writer."""
        ...

    async def drain(self) -> None:
        """Return once few enough records wait for a producer to go on."""
        ...

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        """Return at most ``limit`` durable records with ``seq > after``, in order; none for an unknown run."""
        ...

    async def records(self, run_id: str) -> list[StageRecord]:
        """Return the newest record of each stage's path, in the order of their ``seq``."""
        ...

    # -- runs -----------------------------------------------------------------------------------------------------

    async def run(self, run_id: str) -> RunRecord:
        """Return a run by its id or a prefix that no other id has.

        Raises:
            RunNotFound: there is none, or more than one.
        """
        ...

    async def runs(
        self,
        limit: int | None = 50,
        status: RunStatus | None = None,
        workflow: str | None = None,
        since: float | None = None,
        before: float | None = None,
    ) -> list[RunRecord]:
        """Return the newest runs first.

        Args:
            limit: at most so many; None: all.
            status: only those of this status.
            workflow: only those of this workflow or recipe.
            since: only those created then or later, in seconds since the epoch, UTC.
            before: only those created earlier, likewise.
        """
        ...

    # -- what an attempt leaves -----------------------------------------------------------------------------------

    async def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint; it and everything written before is on the disk itself when this returns.

        Raises:
            Conflict: the run has one of this number.
            RunNotFound, RunEnded, LeaseLost: as ``finish_run``; by the checkpoint's own epoch.
        """
        ...

    async def checkpoints(self, run_id: str, session: str | None = None) -> list[Checkpoint]:
        """Return a run's checkpoints, or those of one session, the newest first; a damaged one says so."""
        ...

    async def drop_checkpoint(self, run_id: str, number: int) -> None:
        """Forget a checkpoint, also as an artifact, of a run that is open here or has ended; one not there is no error.

        Raises:
            RunNotFound: there is no such run.
            LeaseLost: another attempt has it.
        """
        ...

    async def put_artifact(self, run_id: str, artifact: BlobRef) -> None:
        """Record that a run made an artifact. The same one again changes nothing.

        Raises:
            RunNotFound, RunEnded, LeaseLost: as ``finish_run``.
        """
        ...

    async def artifacts(self, run_id: str) -> list[BlobRef]:
        """Return a run's artifacts in the order they were recorded."""
        ...

    async def manifest(self, run_id: str) -> JsonObject | None:
        """Return a run's manifest, or None where it has none."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def only_run(asked: str, found: Sequence[str]) -> str:
    """Return the one run that an id or its prefix leads to.

    Raises:
        RunNotFound: it leads to none or to several.
    """
    if asked and len(found) == 1:
        return found[0]
    if asked and found:
        some = ", ".join(found[:3])
        raise RunNotFound(f"more than one run begins with {asked!r}", hint=f"say more of the id: {some}")
    raise RunNotFound(f"there is no run {asked!r}", hint="list them with `crucible-kitchen runs`")
