"""The journal's front: what both stores do on the event loop, before and after the write itself.

It checks that a log has no gaps, counts what waits, and wakes whoever waits for a record to be durable. It knows no
database and no thread. Read next: ``crucible_kitchen.store.writer``.
"""

from collections.abc import Mapping, Sequence

import anyio
import anyio.lowlevel

from crucible_kitchen.errors import RunNotFound, StoreError
from crucible_kitchen.events import EventRecord

__all__ = ["JournalFront"]

_Waiter = tuple[int, anyio.Event]


class JournalFront:
    """The part of a run store that appends and waits. Everything here runs on the event loop.

    Args:
        limit: how many records may wait for the writer before ``drain`` makes a producer wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = 0
        self._tails: dict[str, int] = {}
        self._durable: dict[str, int] = {}
        self._waiters: dict[str, list[_Waiter]] = {}
        self._drains: list[anyio.Event] = []
        self._error: StoreError | None = StoreError("the run store is not open", hint="await store.open() first")

    # What the two stores supply.

    def _enqueue(self, record: EventRecord) -> None:
        raise NotImplementedError

    def _notice(self) -> None:
        """Tell the writer that records were queued."""
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
        tails = self._tails
        for record in records:
            tail = tails.get(record.run_id)
            if tail is None:
                raise RunNotFound(f"the log of run {record.run_id!r} is not open for writing here")
            if record.seq != tail + 1:
                raise StoreError(f"record {record.seq} of run {record.run_id!r} does not follow record {tail}")
            tails[record.run_id] = record.seq
            self._pending += 1
            self._enqueue(record)
        self._notice()

    def durable(self, run_id: str) -> int:
        """See ``RunStore.durable``."""
        return self._durable.get(run_id, 0)

    async def flush(self, run_id: str, seq: int) -> None:
        """See ``RunStore.flush``."""
        self._check()
        if seq > self._tails.get(run_id, 0):
            raise StoreError(f"record {seq} of run {run_id!r} was never appended")
        if self._durable.get(run_id, 0) >= seq:
            await anyio.lowlevel.checkpoint()
            return
        self._hurry()
        await self._reach(run_id, seq)

    async def durable_after(self, run_id: str, seq: int) -> int:
        """See ``RunStore.durable_after``."""
        if self._durable.get(run_id, 0) > seq:
            await anyio.lowlevel.checkpoint()
        else:
            self._check()
            await self._reach(run_id, seq + 1)
        return self._durable[run_id]

    async def drain(self) -> None:
        """See ``RunStore.drain``."""
        await anyio.lowlevel.checkpoint()
        while self._pending > self._limit:
            self._check()
            self._hurry()
            drained = anyio.Event()
            self._drains.append(drained)
            await drained.wait()
        self._check()

    # What the writer reports back.

    def _ready(self) -> None:
        """The store is open: writes are welcome."""
        self._error = None

    def _opened(self, run_id: str) -> None:
        """A run was created: its log is empty and open."""
        self._tails.setdefault(run_id, 0)
        self._durable.setdefault(run_id, 0)

    def _committed(self, last: Mapping[str, int], count: int) -> None:
        """``count`` records became durable; ``last`` says up to where, by run."""
        self._pending -= count
        for run_id, seq in last.items():
            self._durable[run_id] = seq
            waiters = self._waiters.get(run_id)
            if waiters:
                self._waiters[run_id] = [w for w in waiters if w[0] > seq]
                for wanted, event in waiters:
                    if wanted <= seq:
                        event.set()
        if self._drains and self._pending <= self._limit:
            self._wake_drains()

    def _fail(self, error: StoreError) -> None:
        """Nothing can be written any more; everyone who waits learns it. The first error stays."""
        if self._error is None:
            self._error = error
        waiting, self._waiters = self._waiters, {}
        for waiters in waiting.values():
            for _, event in waiters:
                event.set()
        self._wake_drains()

    def _check(self) -> None:
        """Raise the error that stopped the store: a new one for every caller, so that tracebacks do not mix."""
        error = self._error
        if error is not None:
            raise type(error)(error.message, hint=error.hint) from error

    def _wake_drains(self) -> None:
        drains, self._drains = self._drains, []
        for event in drains:
            event.set()

    async def _reach(self, run_id: str, seq: int) -> None:
        waiter = (seq, anyio.Event())
        self._waiters.setdefault(run_id, []).append(waiter)
        try:
            await waiter[1].wait()
        finally:
            waiters = self._waiters.get(run_id)
            if waiters and waiter in waiters:
                waiters.remove(waiter)
        if self._durable.get(run_id, 0) < seq:
            self._check()
