"""What a run store is: its Protocol, its records, and the order it promises.

It knows nothing of who writes the log or reads it, and of no database. Read next: ``crucible_kitchen.store.front``
(the journal's waiting room, shared by both stores), ``.sqlite`` and ``.memory``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias

from crucible_kitchen.errors import RunNotFound
from crucible_kitchen.events import EventRecord
from crucible_kitchen.types import BlobRef, JsonObject

__all__ = ["FinalStatus", "RunRecord", "RunStatus", "RunStore", "only_run"]

RunStatus: TypeAlias = Literal["running", "completed", "failed", "cancelled", "paused", "crashed"]
FinalStatus: TypeAlias = Literal["completed", "failed", "cancelled", "paused", "crashed"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as the store keeps it.

    Attributes:
        run_id: the run's id, unique in the store.
        workflow: the workflow's or recipe's name.
        status: ``running`` until ``finish_run``.
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


class RunStore(Protocol):
    """Runs, their logs, artifacts and manifests.

    Guarantees: a run's log counts 1, 2, 3 without gaps and never changes once written; what ``flush`` returned for, or
    ``durable`` counts, survives the end of the process; writes take effect in the order they were asked for; after a
    failed write every later write, ``flush`` and ``drain`` raises the same error: a run stops rather than go on
    without its log.
    """

    async def open(self) -> None:
        """Open the store, creating or migrating it where needed.

        Raises:
            StoreError: it cannot be opened, or was written by a newer version of this package.
        """
        ...

    async def aclose(self) -> None:
        """Write all that waits, then close. Idempotent."""
        ...

    async def create_run(self, record: RunRecord) -> None:
        """Store a new run and open its log for writing.

        Raises:
            Conflict: the id is taken.
        """
        ...

    async def finish_run(
        self, run_id: str, status: FinalStatus, result: JsonObject, error: JsonObject | None = None
    ) -> None:
        """Record how a run ended; everything written before is on the disk itself when this returns.

        Raises:
            RunNotFound: there is no such run.
            Conflict: it has already ended.
        """
        ...

    @property
    def pending(self) -> int:
        """How many records wait for the writer; above the store's limit a producer awaits ``drain``."""
        ...

    def append(self, records: Sequence[EventRecord]) -> None:
        """Queue records for the log; never blocks. They are durable at most 100 ms later, sooner with ``flush``.

        Raises:
            RunNotFound: the run was not created in this store since it was opened.
            StoreError: a record does not follow the last one, or an earlier write failed.
        """
        ...

    async def flush(self, run_id: str, seq: int) -> None:
        """Return when every record of the run up to ``seq`` is durable; hurries the writer.

        Raises:
            StorageFull: the disk is full.
            StoreError: a write failed, or ``seq`` was never appended.
        """
        ...

    def durable(self, run_id: str) -> int:
        """Return the last durable seq of a run written since the store was opened; 0 for others."""
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

    async def run(self, run_id: str) -> RunRecord:
        """Return a run by its id or a prefix that no other id has.

        Raises:
            RunNotFound: there is none, or more than one.
        """
        ...

    async def runs(
        self, limit: int = 50, status: RunStatus | None = None, workflow: str | None = None
    ) -> list[RunRecord]:
        """Return the newest runs first."""
        ...

    async def put_artifact(self, run_id: str, artifact: BlobRef) -> None:
        """Record that a run made an artifact. The same one again changes nothing.

        Raises:
            RunNotFound: there is no such run.
        """
        ...

    async def artifacts(self, run_id: str) -> list[BlobRef]:
        """Return a run's artifacts in the order they were recorded."""
        ...

    async def put_manifest(self, run_id: str, manifest: JsonObject) -> None:
        """Store a run's manifest, in place of an earlier one.

        Raises:
            RunNotFound: there is no such run.
        """
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
