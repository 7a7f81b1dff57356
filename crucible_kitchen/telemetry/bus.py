"""A run's event log: emitting is synchronous and cheap, reading is from any place, in order and without gaps.

It knows a journal by what it can do (:class:`Journal`), not the run store. Nothing is shown before it is durable.
Read next: ``crucible_kitchen.telemetry.sinks``.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from crucible_kitchen.events import Event, EventRecord, WorkflowStop
from crucible_kitchen.waits import waiting

__all__ = ["EventLog", "Journal"]


class Journal(Protocol):
    """What keeps a log: every ``RunStore`` does; its docstrings state the guarantees."""

    def append(self, records: Sequence[EventRecord]) -> None:
        """Queue records, which follow the last ones; never blocks."""
        ...

    async def flush(self, run_id: str, seq: int) -> None:
        """Return when every record up to ``seq`` is durable."""
        ...

    async def durable_after(self, run_id: str, seq: int) -> int:
        """Wait until a record after ``seq`` is durable and return the last durable seq."""
        ...

    async def drain(self) -> None:
        """Return once few enough records wait for a producer to go on."""
        ...

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        """Return durable records after a place, in order."""
        ...


class EventLog:
    """The events of one run's attempt.

    Subscribers are independent: each has its own place and reads what is durable, from memory while it keeps up and
    from the journal when it fell behind. A slow one delays nobody and loses nothing; one that went away is forgotten.

    Args:
        run_id: the run, whose log the journal has open.
        journal: where records are kept.
        clock: seconds since the epoch, for the records' times.
        keep: how many of the newest records stay in memory.
        start: the last seq that the journal already holds.
    """

    def __init__(
        self, run_id: str, journal: Journal, *, clock: Callable[[], float] = time.time, keep: int = 4096, start: int = 0
    ) -> None:
        self.run_id = run_id
        self._journal = journal
        self._clock = clock
        self._keep = keep
        self._start = start
        self._seq = start
        self._end: int | None = None
        self._recent: dict[int, EventRecord] = {}

    @property
    def start(self) -> int:
        """The last seq of earlier attempts."""
        return self._start

    @property
    def seq(self) -> int:
        """The last emitted record's place; its record may not be durable yet."""
        return self._seq

    @property
    def ended(self) -> bool:
        """Whether the terminal event was emitted."""
        return self._end is not None

    def emit(self, event: Event) -> EventRecord:
        """Give an event the next place and queue it for the journal; never blocks.

        Raises:
            StoreError: the journal can no longer be written.
            RuntimeError: the terminal event was emitted before.
        """
        if self._end is not None:
            raise RuntimeError(f"the log of run {self.run_id!r} has ended; {event.name!r} came after it")
        seq = self._seq + 1
        record = EventRecord(self.run_id, seq, self._clock(), event)
        self._journal.append((record,))
        self._seq = seq
        self._recent[seq] = record
        self._recent.pop(seq - self._keep, None)
        if isinstance(event, WorkflowStop):
            self._end = seq
        return record

    async def sync(self) -> None:
        """Return once everything emitted so far is durable.

        Raises:
            StoreError: the journal can no longer be written.
        """
        with waiting("log", self.run_id):
            await self._journal.flush(self.run_id, self._seq)

    async def drain(self) -> None:
        """Return once few enough records wait to be written; for producers that never ``sync``."""
        await self._journal.drain()

    def events(self, after: int | None = None) -> AsyncIterator[EventRecord]:
        """Iterate over the durable records after a place, in order, without gaps, up to the terminal one.

        Without a place it begins with this attempt's first. The iterator holds nothing: it can be left at any time and
        made again with the last ``seq``.

        Raises:
            StoreError: the journal can no longer be written, so that no further record will come.
        """
        return _Records(self.batches(after))

    def batches(self, after: int | None = None, size: int = 256) -> AsyncIterator[Sequence[EventRecord]]:
        """Iterate like :meth:`events`, over all that is there at a time, at most ``size`` records."""
        return _Batches(self, self._start if after is None else after, size)

    async def _next(self, after: int, size: int) -> Sequence[EventRecord]:
        """Return the next durable records, waiting for them; none once the log has ended."""
        if self._end is not None and after >= self._end:
            return ()
        last = min(await self._journal.durable_after(self.run_id, after), after + size)
        if after + 1 in self._recent:
            return [self._recent[seq] for seq in range(after + 1, last + 1)]
        return await self._journal.read(self.run_id, after, last - after)


class _Batches:
    """A place in a log. Not a generator: those want to be closed when they are left."""

    def __init__(self, log: EventLog, after: int, size: int) -> None:
        self._log = log
        self._after = after
        self._size = size

    def __aiter__(self) -> "_Batches":
        return self

    async def __anext__(self) -> Sequence[EventRecord]:
        batch = await self._log._next(self._after, self._size)
        if not batch:
            raise StopAsyncIteration
        self._after = batch[-1].seq
        return batch


class _Records:
    """The records of batches, one by one."""

    def __init__(self, batches: AsyncIterator[Sequence[EventRecord]]) -> None:
        self._batches = batches
        self._ready: Iterator[EventRecord] = iter(())

    def __aiter__(self) -> "_Records":
        return self

    async def __anext__(self) -> EventRecord:
        record = next(self._ready, None)
        if record is None:
            self._ready = iter(await anext(self._batches))
            record = next(self._ready)
        return record
