"""The run store's twin in memory: same Protocol, same contract suite, no file and no thread.

For tests on virtual time and for runs that need no history. It knows no database. Read next: ``tests/store``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import anyio.lowlevel

from crucible_kitchen.errors import Conflict, RunNotFound, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store.base import TTL, only_run
from crucible_kitchen.store.codec import decode_event, encode_event, encode_json, sealed, through_json
from crucible_kitchen.store.front import Entry, JournalFront
from crucible_kitchen.store.leases import GIVEN_UP, held, orphaned, run_ended, run_live
from crucible_kitchen.store.owner import Owner
from crucible_kitchen.store.records import Attempt, Checkpoint, FinalStatus, Lease, RunRecord, RunStatus, StageRecord
from crucible_kitchen.types import BlobRef, JsonObject

__all__ = ["MemoryRunStore"]


@dataclass(slots=True)
class _Run:
    """A run and all that is kept of it."""

    record: RunRecord
    until: float | None = None
    """When the lease of the last attempt ends; None: nobody has one."""
    epoch: int | None = None
    """The attempt that may write."""
    attempts: list[Attempt] = field(default_factory=list)
    log: list[EventRecord] = field(default_factory=list)
    stages: dict[str, StageRecord] = field(default_factory=dict)
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    artifacts: dict[BlobRef, None] = field(default_factory=dict)
    manifest: JsonObject | None = None

    def held(self, now: float) -> bool:
        return self.until is not None and held(self.attempts[-1].owner, self.until, now)

    def begin(self, owner: Owner | None, now: float, ttl: float, manifest: JsonObject | None) -> Lease:
        number = self.epoch = len(self.attempts) + 1
        owner = owner or Owner.here()
        self.attempts.append(Attempt(self.record.run_id, number, owner, now, len(self.log)))
        self.until = now + ttl
        self.manifest = self.manifest if manifest is None else through_json(manifest)
        self.record = replace(self.record, status="running", finished_at=None, result=None, error=None)
        return Lease(self.record.run_id, number, self.until, len(self.log))

    def end(self, status: FinalStatus, now: float, result: JsonObject | None, error: JsonObject | None) -> None:
        self.until = self.epoch = None
        self.attempts[-1] = replace(self.attempts[-1], ended_at=now, status=status, error=error)
        self.record = replace(self.record, status=status, finished_at=now, result=result, error=error)


class MemoryRunStore(JournalFront):
    """A run store in memory; a record is durable as soon as it is appended.

    Reading gives back what SQLite would: values that went through JSON.

    Args:
        clock: seconds since the epoch, for leases and ends.
        beside: another store, whose runs this one shares, as two processes share a file.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time, beside: "MemoryRunStore | None" = None) -> None:
        super().__init__(limit=0)
        self._clock = clock
        self._runs: dict[str, _Run] = {} if beside is None else beside._runs

    # The journal's side.

    def _enqueue(self, entry: Entry) -> None:
        epoch, record = entry
        self._pending -= 1
        run = self._runs.get(record.run_id)
        if run is None or run.epoch != epoch:
            self._lost(record.run_id, epoch)
        elif isinstance(record, EventRecord):
            run.log.append(record)
            self._reached(record.run_id, record.seq, 0)
        else:
            run.stages.pop(record.path, None)
            run.stages[record.path] = replace(record, value=through_json(record.value))
            self._reached(record.run_id, 0, 1)

    def _hurry(self) -> None:
        """Do nothing: what was appended is durable."""

    async def open(self) -> None:
        """See ``RunStore.open``."""
        await anyio.lowlevel.checkpoint()
        self._ready()

    async def aclose(self) -> None:
        """See ``RunStore.aclose``."""
        if self._error is None:
            for run_id, epoch in self._leases():
                if self._runs[run_id].epoch == epoch:
                    self._runs[run_id].until = GIVEN_UP
        self._fail(StoreError("the run store is closed"))
        await anyio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # Attempts.

    async def create_run(
        self, record: RunRecord, owner: Owner | None = None, ttl: float = TTL, *, manifest: JsonObject | None = None
    ) -> Lease:
        """See ``RunStore.create_run``."""
        await self._step()
        if record.run_id in self._runs:
            raise Conflict(f"the run {record.run_id!r} exists already")
        run = self._runs[record.run_id] = _Run(replace(record, config=through_json(record.config)))
        lease = run.begin(owner, self._clock(), ttl, manifest)
        self._opened(lease)
        return lease

    async def open_attempt(
        self, run_id: str, owner: Owner | None = None, ttl: float = TTL, *, manifest: JsonObject | None = None
    ) -> Lease:
        """See ``RunStore.open_attempt``."""
        run = await self._known(run_id)
        now = self._clock()
        if run.until is not None:
            last = run.attempts[-1]
            if run.held(now):
                raise run_live(run_id, last.owner, last.started_at, run.until)
            run.end("crashed", now, None, None)
        elif run.record.status == "completed":
            raise run_ended(run_id, run.record.status)
        lease = run.begin(owner, now, ttl, manifest)
        self._opened(lease)
        return lease

    async def renew(self, lease: Lease, ttl: float = TTL) -> Lease:
        """See ``RunStore.renew``."""
        await self._step()
        run = self._runs.get(lease.run_id)
        if run is None or run.until is None or run.epoch != lease.epoch:
            raise self._lost(lease.run_id, lease.epoch)
        run.until = max(run.until, self._clock() + ttl)
        return replace(lease, until=run.until)

    async def finish_run(
        self, run_id: str, status: FinalStatus, result: JsonObject, error: JsonObject | None = None
    ) -> None:
        """See ``RunStore.finish_run``."""
        run = await self._mine(run_id)
        run.end(status, self._clock(), through_json(result), error and through_json(error))
        self._closed(run_id, run_ended(run_id, status))

    async def attempts(self, run_id: str) -> list[Attempt]:
        """See ``RunStore.attempts``."""
        await self._step()
        return list(self._runs[run_id].attempts) if run_id in self._runs else []

    async def reconcile(self) -> list[RunRecord]:
        """See ``RunStore.reconcile``."""
        await self._step()
        now = self._clock()
        found = [
            run
            for run in self._runs.values()
            if run.until is not None and orphaned(run.attempts[-1].owner, run.until, now)
        ]
        for run in found:
            run.end("crashed", now, None, None)
        return [run.record for run in found]

    async def delete_run(self, run_id: str) -> None:
        """See ``RunStore.delete_run``."""
        run = await self._known(run_id)
        if run.until is not None and run.held(self._clock()):
            raise run_live(run_id, run.attempts[-1].owner, run.attempts[-1].started_at, run.until)
        del self._runs[run_id]

    # Reading.

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        """See ``RunStore.read``."""
        await self._step()
        records = self._runs[run_id].log[after : after + limit] if run_id in self._runs else []
        return [decode_event(r.run_id, r.seq, r.time, r.event.name, encode_event(r.event)) for r in records]

    async def records(self, run_id: str) -> list[StageRecord]:
        """See ``RunStore.records``."""
        await self._step()
        kept = self._runs[run_id].stages.values() if run_id in self._runs else ()
        return sorted((replace(r, value=through_json(r.value)) for r in kept), key=lambda record: record.seq)

    async def run(self, run_id: str) -> RunRecord:
        """See ``RunStore.run``."""
        await self._step()
        found = [run_id] if run_id in self._runs else [known for known in self._runs if known.startswith(run_id)]
        return self._runs[only_run(run_id, found)].record

    async def runs(
        self,
        limit: int | None = 50,
        status: RunStatus | None = None,
        workflow: str | None = None,
        since: float | None = None,
        before: float | None = None,
    ) -> list[RunRecord]:
        """See ``RunStore.runs``."""
        await self._step()
        wanted = [
            run.record
            for run in self._runs.values()
            if status in (None, run.record.status)
            and workflow in (None, run.record.workflow)
            and (since is None or run.record.created_at >= since)
            and (before is None or run.record.created_at < before)
        ]
        return sorted(wanted, key=lambda run: run.created_at)[::-1][:limit]  # stable: the newest of one moment first

    # What an attempt leaves.

    async def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See ``RunStore.put_checkpoint``."""
        run = await self._mine(checkpoint.run_id, checkpoint.epoch)
        if checkpoint.number in run.checkpoints:
            raise Conflict(f"the run {checkpoint.run_id!r} has a checkpoint {checkpoint.number} already")
        run.checkpoints[checkpoint.number] = sealed(checkpoint)

    async def checkpoints(self, run_id: str, session: str | None = None) -> list[Checkpoint]:
        """See ``RunStore.checkpoints``."""
        await self._step()
        kept = self._runs[run_id].checkpoints if run_id in self._runs else {}
        found = [kept[number] for number in sorted(kept, reverse=True) if session in (None, kept[number].session)]
        return [replace(c, data=through_json(c.data), states=through_json(c.states)) for c in found]

    async def drop_checkpoint(self, run_id: str, number: int) -> None:
        """See ``RunStore.drop_checkpoint``."""
        run = await self._known(run_id)
        if run.until is not None and run.epoch != self._current(run_id):
            raise self._lost(run_id, self._current(run_id))
        dropped = run.checkpoints.pop(number, None)
        states = encode_json(dropped.states) if dropped is not None else ""
        for artifact in [a for a in run.artifacts if a.kind == "checkpoint" and encode_json(a.uri) in states]:
            del run.artifacts[artifact]

    async def put_artifact(self, run_id: str, artifact: BlobRef) -> None:
        """See ``RunStore.put_artifact``."""
        (await self._mine(run_id)).artifacts.setdefault(artifact)

    async def artifacts(self, run_id: str) -> list[BlobRef]:
        """See ``RunStore.artifacts``."""
        await self._step()
        return list(self._runs[run_id].artifacts) if run_id in self._runs else []

    async def manifest(self, run_id: str) -> JsonObject | None:
        """See ``RunStore.manifest``."""
        await self._step()
        manifest = self._runs[run_id].manifest if run_id in self._runs else None
        return None if manifest is None else through_json(manifest)

    async def _step(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._check()

    async def _known(self, run_id: str) -> _Run:
        await self._step()
        if run_id not in self._runs:
            raise RunNotFound(f"there is no run {run_id!r}")
        return self._runs[run_id]

    async def _mine(self, run_id: str, epoch: int | None = None) -> _Run:
        """Return a run that this store, or the given attempt, may write to."""
        run = await self._known(run_id)
        epoch = self._epoch(run_id) if epoch is None else epoch
        if epoch is None and run.until is None:
            raise run_ended(run_id, run.record.status)
        if epoch is None or run.epoch != epoch:
            raise self._lost(run_id, epoch)
        return run
