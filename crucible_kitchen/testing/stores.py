"""A run store that breaks, or dies, at its n-th write: for sweeps over every point at which a run can end.

It knows the run store's Protocol and no store. Read next: ``crucible_kitchen.store.base``.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import anyio.lowlevel

from crucible_kitchen.errors import StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store import (
    TTL,
    Attempt,
    Checkpoint,
    FinalStatus,
    Lease,
    Owner,
    RunRecord,
    RunStatus,
    RunStore,
    StageRecord,
)
from crucible_kitchen.store.front import Committed, Entry, JournalFront
from crucible_kitchen.types import BlobRef, JsonObject

__all__ = ["FaultyStore", "dead_owner"]


def dead_owner() -> Owner:
    """Return a process of this machine that does not live: what it owns can be taken over at once."""
    return replace(Owner.here(), pid=2**31 - 1)  # beyond what any system hands out


class FaultyStore:
    """A run store in front of another one, for one process's life.

    Its attempts belong to a process that is dead for everyone else, so that the next one can take over at once.

    Args:
        store: where everything is kept; it may be any run store.
        at: the write that is struck, counted from 1 over all records appended and all other changes; None: none.
        error: raised by this write and by all that is asked for afterwards, as a store does whose disk is full; None:
            the process is killed, so that this write and all after it are lost, though it is told that they succeeded.

    Example::

        for n in range(1, 1_000_000):
            async with FaultyStore(SqliteRunStore(path), at=n) as store:
                ...  # run
            async with SqliteRunStore(path) as store:
                ...  # resume, compare with a run that was not disturbed
            if not store.struck:
                break
    """

    def __init__(self, store: RunStore, *, at: int | None = None, error: StoreError | None = None) -> None:
        self.writes = 0
        self.struck = False
        self._store = store
        self._at = at
        self._broken = error
        self._ghost = _Ghost()

    @property
    def inner(self) -> RunStore:
        """The store that everything is kept in."""
        return self._store

    async def _strikes(self) -> bool:
        """Count a change; return whether it is lost."""
        lost = self._count()
        if lost:
            await anyio.lowlevel.checkpoint()
        return lost

    def _count(self) -> bool:
        self.writes += 1
        if self._at is not None and self.writes >= self._at:
            self.struck = True
            self._check()
        return self.struck

    def _check(self) -> None:
        if self.struck and self._broken is not None:
            raise type(self._broken)(self._broken.message, hint=self._broken.hint)

    @property
    def _journal(self) -> RunStore | JournalFront:
        """What answers for the log: after the process's death, what it believes."""
        self._check()
        return self._ghost if self.struck else self._store

    # -- the process's life ---------------------------------------------------------------------------------------

    async def open(self) -> None:
        """See ``RunStore.open``."""
        await self._store.open()

    async def aclose(self) -> None:
        """See ``RunStore.aclose``."""
        await self._store.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- attempts -------------------------------------------------------------------------------------------------

    async def create_run(
        self, record: RunRecord, owner: Owner | None = None, ttl: float = TTL, *, manifest: JsonObject | None = None
    ) -> Lease:
        """See ``RunStore.create_run``."""
        if await self._strikes():
            return self._ghost.lease(Lease(record.run_id, 1, ttl, 0))
        return self._ghost.lease(await self._store.create_run(record, owner or dead_owner(), ttl, manifest=manifest))

    async def open_attempt(
        self, run_id: str, owner: Owner | None = None, ttl: float = TTL, *, manifest: JsonObject | None = None
    ) -> Lease:
        """See ``RunStore.open_attempt``."""
        if await self._strikes():
            before = await self._store.attempts(run_id)
            seq = len(await self._store.read(run_id, 0, 1_000_000))
            return self._ghost.lease(Lease(run_id, len(before) + 1, ttl, seq))
        return self._ghost.lease(await self._store.open_attempt(run_id, owner or dead_owner(), ttl, manifest=manifest))

    async def renew(self, lease: Lease, ttl: float = TTL) -> Lease:
        """See ``RunStore.renew``. It is no write that counts: when it comes depends on the time."""
        self._check()
        return lease if self.struck else await self._store.renew(lease, ttl)

    async def finish_run(
        self, run_id: str, status: FinalStatus, result: JsonObject, error: JsonObject | None = None
    ) -> None:
        """See ``RunStore.finish_run``."""
        if not await self._strikes():
            await self._store.finish_run(run_id, status, result, error)

    async def attempts(self, run_id: str) -> list[Attempt]:
        """See ``RunStore.attempts``."""
        return await self._store.attempts(run_id)

    async def reconcile(self) -> list[RunRecord]:
        """See ``RunStore.reconcile``."""
        return [] if await self._strikes() else await self._store.reconcile()

    async def delete_run(self, run_id: str) -> None:
        """See ``RunStore.delete_run``."""
        if not await self._strikes():
            await self._store.delete_run(run_id)

    # -- the log --------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """See ``RunStore.pending``."""
        return self._store.pending

    def append(self, records: Sequence[EventRecord]) -> None:
        """See ``RunStore.append``."""
        for record in records:
            if not self._count():
                self._store.append((record,))
            self._ghost.append((record,))

    def record(self, record: StageRecord) -> None:
        """See ``RunStore.record``."""
        if not self._count():
            self._store.record(record)

    async def flush(self, run_id: str, seq: int) -> None:
        """See ``RunStore.flush``."""
        await self._journal.flush(run_id, seq)

    def durable(self, run_id: str) -> int:
        """See ``RunStore.durable``."""
        return (self._ghost if self.struck and self._broken is None else self._store).durable(run_id)

    async def durable_after(self, run_id: str, seq: int) -> int:
        """See ``RunStore.durable_after``."""
        return await self._journal.durable_after(run_id, seq)

    async def drain(self) -> None:
        """See ``RunStore.drain``."""
        await self._journal.drain()

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        """See ``RunStore.read``."""
        return await self._store.read(run_id, after, limit)

    async def records(self, run_id: str) -> list[StageRecord]:
        """See ``RunStore.records``."""
        return await self._store.records(run_id)

    # -- runs, and what an attempt leaves ---------------------------------------------------------------------------

    async def run(self, run_id: str) -> RunRecord:
        """See ``RunStore.run``."""
        return await self._store.run(run_id)

    async def runs(
        self,
        limit: int | None = 50,
        status: RunStatus | None = None,
        workflow: str | None = None,
        since: float | None = None,
        before: float | None = None,
    ) -> list[RunRecord]:
        """See ``RunStore.runs``."""
        return await self._store.runs(limit, status, workflow, since, before)

    async def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See ``RunStore.put_checkpoint``."""
        if not await self._strikes():
            await self._store.put_checkpoint(checkpoint)

    async def checkpoints(self, run_id: str, session: str | None = None) -> list[Checkpoint]:
        """See ``RunStore.checkpoints``."""
        return await self._store.checkpoints(run_id, session)

    async def drop_checkpoint(self, run_id: str, number: int) -> None:
        """See ``RunStore.drop_checkpoint``."""
        if not await self._strikes():
            await self._store.drop_checkpoint(run_id, number)

    async def put_artifact(self, run_id: str, artifact: BlobRef) -> None:
        """See ``RunStore.put_artifact``."""
        if not await self._strikes():
            await self._store.put_artifact(run_id, artifact)

    async def artifacts(self, run_id: str) -> list[BlobRef]:
        """See ``RunStore.artifacts``."""
        return await self._store.artifacts(run_id)

    async def manifest(self, run_id: str) -> JsonObject | None:
        """See ``RunStore.manifest``."""
        return await self._store.manifest(run_id)


class _Ghost(JournalFront):
    """The log as a dead process believes it to be: everything it appends is durable at once."""

    def __init__(self) -> None:
        super().__init__(limit=0)
        self._ready()

    def lease(self, lease: Lease) -> Lease:
        """Follow an attempt from its opening on."""
        self._opened(lease)
        return lease

    def _enqueue(self, entry: Entry) -> None:
        record = entry[1]
        self._committed(Committed(1, {record.run_id: (record.seq, 0)}))

    def _hurry(self) -> None:
        """Do nothing: what was appended is durable."""
