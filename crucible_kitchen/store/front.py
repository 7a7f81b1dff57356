"""The journal's front: what both stores do on the event loop, before and after the write itself.

It checks that a log has no gaps, counts what waits, wakes whoever waits for a record to be durable, and remembers which
attempt of a run writes here. It knows no database and no thread. Read next: ``crucible_kitchen.store.writer``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import anyio.lowlevel

from crucible_kitchen.errors import LeaseLost, RunNotFound, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.loop import EventLoop, Signal
from crucible_kitchen.store.leases import lease_lost
from crucible_kitchen.store.records import Lease, StageRecord

__all__ = ["Committed", "Entry", "JournalFront", "fresh"]

Entry: TypeAlias = tuple[int, EventRecord | StageRecord]
"""What is queued for the journal: the epoch it is written under, and the record."""


class Committed(NamedTuple):
    """What one commit did.

    Attributes:
        entries: how many it took off the queue.
        durable: by run, the last event that became durable (0: none did) and how many stages' records did.
        refused: the attempts whose entries were left out, because they no longer have their run.
    """

    entries: int
    durable: Mapping[str, tuple[int, int]]
    refused: Sequence[tuple[str, int]] = ()


@dataclass(slots=True, eq=False)
class _Waiter:
    seq: int
    stages: int
    done: Signal


@dataclass(slots=True, eq=False)
class _Log:
    """A run's log as it is open here: places are counted in events and in stages' records."""

    epoch: int
    tail: int
    durable: int
    stages: int = 0
    durable_stages: int = 0
    waiters: list[_Waiter] = field(default_factory=list)
    error: StoreError | None = None

    def reached(self, waiter: _Waiter) -> bool:
        return self.durable >= waiter.seq and self.durable_stages >= waiter.stages


class JournalFront:
    """The part of a run store that appends and waits. Everything here runs on the event loop.

    Args:
        limit: how many records may wait for the writer before ``drain`` makes a producer wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = 0
        self._open_logs: dict[str, _Log] = {}
        self._drains: list[Signal] = []
        self._error: StoreError | None = StoreError("the run store is not open", hint="await store.open() first")
        self._loop: EventLoop

    # What the two stores supply.

    def _enqueue(self, entry: Entry) -> None:
        """Queue an entry, which the writer writes soon."""
        raise NotImplementedError

    def _hurry(self) -> None:
        """Make the writer commit what it has now."""
        raise NotImplementedError

    # What a run sees.

    @property
    def pending(self) -> int:
        """How many records wait for the writer."""
        return self._pending

    def append(self, records: Sequence[EventRecord]) -> None:
        """See ``RunStore.append``."""
        if self._error is not None:
            self._check()
        for record in records:
            log = self._writing(record.run_id)
            if record.seq != log.tail + 1:
                raise StoreError(f"record {record.seq} of run {record.run_id!r} does not follow record {log.tail}")
            log.tail = record.seq
            self._pending += 1
            self._enqueue((log.epoch, record))

    def record(self, record: StageRecord) -> None:
        """See ``RunStore.record``."""
        self._check()
        log = self._writing(record.run_id)
        log.stages += 1
        self._pending += 1
        self._enqueue((log.epoch, record))

    def durable(self, run_id: str) -> int:
        """See ``RunStore.durable``."""
        log = self._open_logs.get(run_id)
        return 0 if log is None else log.durable

    async def flush(self, run_id: str, seq: int) -> None:
        """See ``RunStore.flush``."""
        self._check()
        log = self._open_logs.get(run_id)
        if log is None or seq > log.tail:
            raise StoreError(f"record {seq} of run {run_id!r} was never appended")
        waiter = _Waiter(seq, log.stages, self._loop.signal())
        if log.reached(waiter):
            await anyio.lowlevel.checkpoint()
            return
        if log.error is not None:
            raise fresh(log.error)
        self._hurry()
        await self._reach(log, waiter)

    async def durable_after(self, run_id: str, seq: int) -> int:
        """See ``RunStore.durable_after``."""
        log = self._open_logs.get(run_id)
        if log is not None and log.durable > seq:
            await anyio.lowlevel.checkpoint()
            return log.durable
        self._check()
        log = self._writing(run_id)
        await self._reach(log, _Waiter(seq + 1, 0, self._loop.signal()))
        return log.durable

    async def drain(self) -> None:
        """See ``RunStore.drain``."""
        await anyio.lowlevel.checkpoint()
        while self._pending > self._limit:
            self._check()
            self._hurry()
            drained = self._loop.signal()
            self._drains.append(drained)
            await drained
        self._check()

    # What the store and its writer report back.

    def _ready(self) -> None:
        """The store is open: writes are welcome."""
        self._loop = EventLoop()
        self._error = None

    def _opened(self, lease: Lease) -> None:
        """An attempt was opened here: the run's log goes on after the last durable record."""
        before = self._open_logs.get(lease.run_id)
        if before is not None:
            self._closed(lease.run_id, lease_lost(lease.run_id, before.epoch))
        self._open_logs[lease.run_id] = _Log(lease.epoch, lease.seq, lease.seq)

    def _closed(self, run_id: str, error: StoreError) -> None:
        """An attempt can write no more, because it has ended or lost its run; whoever waits for it learns why."""
        log = self._open_logs.get(run_id)
        if log is not None and log.error is None:
            log.error = error
            self._wake(log)

    def _lost(self, run_id: str, epoch: int | None) -> LeaseLost:
        """An attempt turned out to have lost its run: return the error to raise."""
        error = lease_lost(run_id, epoch)
        log = self._open_logs.get(run_id)
        if log is not None and log.epoch == epoch:
            self._closed(run_id, error)
        return error

    def _epoch(self, run_id: str) -> int | None:
        """Return the epoch that a run is written under here; None where it was not opened.

        Raises:
            RunEnded, LeaseLost: it can be written to no more.
        """
        log = self._open_logs.get(run_id)
        if log is None:
            return None
        if log.error is not None:
            raise fresh(log.error)
        return log.epoch

    def _current(self, run_id: str) -> int | None:
        """Return the epoch that a run can be written to under here, or None."""
        log = self._open_logs.get(run_id)
        return None if log is None or log.error is not None else log.epoch

    def _leases(self) -> list[tuple[str, int]]:
        """Return the runs that can be written to here, with their epochs."""
        return [(run_id, log.epoch) for run_id, log in self._open_logs.items() if log.error is None]

    def _committed(self, done: Committed) -> None:
        """A commit was made."""
        self._pending -= done.entries
        for run_id, (seq, stages) in done.durable.items():
            self._reached(run_id, seq, stages)
        for run_id, epoch in done.refused:
            self._lost(run_id, epoch)
        if self._drains and self._pending <= self._limit:
            self._wake_drains()

    def _reached(self, run_id: str, seq: int, stages: int) -> None:
        """A run's log is durable up to an event (0: none of them is new), and so are more stages' records."""
        log = self._open_logs[run_id]
        log.durable = seq or log.durable
        log.durable_stages += stages
        if log.waiters:
            self._wake(log)

    def _fail(self, error: StoreError) -> None:
        """Nothing can be written any more; everyone who waits learns it. The first error stays."""
        if self._error is None:
            self._error = error
        for log in self._open_logs.values():
            self._wake(log)
        self._wake_drains()

    def _check(self) -> None:
        """Raise the error that stopped the store."""
        if self._error is not None:
            raise fresh(self._error) from self._error

    def _writing(self, run_id: str) -> _Log:
        log = self._open_logs.get(run_id)
        if log is None:
            raise RunNotFound(f"the log of run {run_id!r} is not open for writing here")
        if log.error is not None:
            raise fresh(log.error)
        return log

    def _wake(self, log: _Log) -> None:
        """Wake those whose place in a log is durable; all, if it can be written to no more."""
        waiting, log.waiters = log.waiters, []
        stopped = self._error is not None or log.error is not None
        for waiter in waiting:
            if stopped or log.reached(waiter):
                self._loop.set(waiter.done)
            else:
                log.waiters.append(waiter)

    def _wake_drains(self) -> None:
        drains, self._drains = self._drains, []
        for signal in drains:
            self._loop.set(signal)

    async def _reach(self, log: _Log, waiter: _Waiter) -> None:
        log.waiters.append(waiter)
        try:
            await waiter.done
        except BaseException:
            if waiter in log.waiters:  # else it was woken in the moment in which it was cancelled
                log.waiters.remove(waiter)
            raise
        if not log.reached(waiter):
            self._check()
            assert log.error is not None
            raise fresh(log.error)


def fresh(error: StoreError) -> StoreError:
    """Return an error's copy: a new one for every caller, so that tracebacks do not mix."""
    return type(error)(error.message, hint=error.hint)
