"""The one thread that writes: it takes all that waits, writes it in one transaction, and reports once.

It knows entries, functions on a connection and their order; it knows no waiter. What an attempt writes that no longer
has its run is left out by the database (``schema.fenced``) and reported. Read next: ``crucible_kitchen.store.sqlite``.
"""

import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import anyio
import anyio.to_thread

from crucible_kitchen.errors import CrucibleError, StorageFull, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store import schema
from crucible_kitchen.store.codec import encode_event, encode_json
from crucible_kitchen.store.front import Committed, Entry
from crucible_kitchen.store.records import StageRecord
from crucible_kitchen.workers import waker

__all__ = ["Write", "Writer", "translated"]

LINGER = 0.05
"""Seconds an unhurried record may wait for company before it is written."""

ROWS_PER_STATEMENT = 64
"""Records written by one statement: SQLite gives the interpreter up once per statement, not once per record."""

BATCH = 512
"""Most records in one transaction: it bounds how long a commit takes and how long the interpreter is kept busy."""

_EVENTS = [schema.fenced(schema.events, "INSERT", rows) for rows in range(ROWS_PER_STATEMENT + 1)]
_STAGES = [schema.fenced(schema.stage_records, "INSERT OR REPLACE", rows) for rows in range(ROWS_PER_STATEMENT + 1)]
# Statement n inserts n rows at once; each is prepared once, by the driver's own cache.


def translated(error: Exception, doing: str) -> StoreError:
    """Return the store's own error for one of the database's."""
    original = getattr(error, "orig", None) or error
    code = getattr(original, "sqlite_errorname", "") or ""
    if code == "SQLITE_FULL" or getattr(original, "errno", None) == 28:  # ENOSPC
        return StorageFull(f"the disk is full: {doing} failed; what was saved before is untouched", hint="free space")
    if code.startswith("SQLITE_BUSY"):
        return StoreError(f"{doing} failed: another process kept the run store locked", hint="try again")
    if code in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return StoreError(f"{doing} failed: the file is not a run store, or damaged", hint="use another --home")
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")) or getattr(original, "errno", None) == 30:  # EROFS
        return StoreError(
            f"{doing} failed: its directory is read-only, or this user may not write there",
            hint="give another directory: --home DIR",
        )
    return StoreError(f"{doing} failed: {original}")


class Write:
    """One function on the writer's connection, and the task that waits until what it did is committed.

    Args:
        fn: called in the writer's thread, inside the transaction; an error of this project's tree, or a constraint
            that did not hold, is its own answer and leaves the rest of the transaction alone.
        barrier: the commit reaches the disk itself before it is reported, so that it survives a power loss.
    """

    __slots__ = ("barrier", "done", "error", "fn", "result")

    def __init__(self, fn: Callable[[sqlite3.Connection], Any], *, barrier: bool = False) -> None:
        self.fn = fn
        self.barrier = barrier
        self.done = anyio.Event()
        self.error: Exception | None = None
        self.result: Any = None


_Item: TypeAlias = "Entry | Write"


class Failure(Protocol):
    """Called on the event loop once, when nothing can be written any more."""

    def __call__(self, error: StoreError) -> None: ...


class Writer:
    """A thread that writes entries and runs writes, in the order given, with group commit.

    Args:
        connect: opens the connection; called in the thread.
        committed: told, on the event loop, what each commit made durable; once per commit.
        failed: told, on the event loop, that a commit failed; the thread then answers everything with this error.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        committed: Callable[[Committed], object],
        failed: Failure,
    ) -> None:
        self._connect = connect
        self._committed = committed
        self._failed = failed
        self._queue: deque[_Item | None] = deque()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._asleep = False
        self._rung = False
        self._thread = threading.Thread(target=self._work, name="crucible-run-store", daemon=True)

    # On the event loop.

    def start(self) -> None:
        """Start the thread; it reports to the event loop that this is called from."""
        self._wake = waker()
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue an entry; the thread looks at the queue within ``LINGER``."""
        self._queue.append(entry)
        if self._asleep:
            self._asleep = False
            self._ring()

    def hurry(self) -> None:
        """Make the thread write what is queued now."""
        self._asleep = False
        self._ring()

    async def run(self, write: Write) -> Any:
        """Queue a write and return its result once it is committed; cancelling waits, so that its fate is known."""
        self._queue.append(write)
        self.hurry()
        with anyio.CancelScope(shield=True):
            await write.done.wait()
        if write.error is not None:
            raise write.error
        return write.result

    async def aclose(self) -> None:
        """Write all that is queued and end the thread."""
        self._queue.append(None)
        self.hurry()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)

    def _ring(self) -> None:
        # A lock used as a bell: releasing it wakes the thread, which says that it has heard before it looks.
        if not self._rung:
            self._rung = True
            self._bell.release()

    # In the thread.

    def _work(self) -> None:
        connection: sqlite3.Connection | None = None
        try:
            connection = self._connect()
            self._wait()
            while self._write_all(connection):
                self._wait()
        except Exception as error:  # noqa: BLE001 - carried to everyone who waits
            self._stop(translated(error, "writing the run store"))
        finally:
            if connection is not None:
                connection.close()

    def _wait(self) -> None:
        """Wait until something is queued.

        While records come in, the thread looks every ``LINGER`` seconds, so that queueing one costs no wake-up (a
        thread that wakes takes the interpreter from the run). It sleeps for good only when nothing came for so long.
        """
        if self._heard(LINGER) or self._queue:
            return
        self._asleep = True
        if not self._queue:  # in this order: what is queued after this line rings the bell
            self._heard()
        self._asleep = False

    def _heard(self, timeout: float = -1) -> bool:
        """Wait until the bell is rung, for so many seconds at most; afterwards it can be rung again."""
        heard = self._bell.acquire(timeout=timeout)
        if heard:
            self._rung = False
        return heard

    def _write_all(self, connection: sqlite3.Connection) -> bool:
        """Write what is queued; return False when the store closes."""
        while self._queue:
            batch: list[_Item] = []
            closing = False
            while self._queue and len(batch) < BATCH:
                item = self._queue.popleft()
                if item is None:
                    closing = True
                    break
                batch.append(item)
            if batch:
                self._transact(connection, batch)
            if closing:
                return False
        return True

    def _transact(self, connection: sqlite3.Connection, batch: Sequence[_Item]) -> None:
        writes = [item for item in batch if isinstance(item, Write)]
        try:
            done = _apply(connection, batch, writes)
        except Exception as error:
            failure = translated(error, "writing the run store")
            for write in writes:
                write.error = failure
            self._report(lambda: _set_all(writes))
            raise
        self._report(lambda: self._deliver(done, writes))

    def _deliver(self, done: Committed, writes: Sequence[Write]) -> None:
        if done.entries:
            self._committed(done)
        _set_all(writes)

    def _report(self, callback: Callable[[], object]) -> None:
        try:
            self._wake(callback)
        except RuntimeError:  # the loop is gone: nobody waits any more
            return

    def _stop(self, error: StoreError) -> None:
        """Report the failure, then answer what still comes with it, until closed."""
        self._report(lambda: self._failed(error))
        while True:
            while self._queue:
                item = self._queue.popleft()
                if item is None:
                    return
                if isinstance(item, Write):
                    item.error = error
                    self._report(item.done.set)
            self._heard()


class _Batch:
    """The entries of one transaction, written a statement at a time.

    Attributes:
        durable: what the transaction makes durable, by run, as :class:`Committed` reports it.
        refused: the attempts whose entries were left out.
    """

    def __init__(self) -> None:
        self.durable: dict[str, tuple[int, int]] = {}
        self.refused: set[tuple[str, int]] = set()
        self._events: list[tuple[int, EventRecord]] = []
        self._stages: list[tuple[int, StageRecord]] = []

    def add(self, connection: sqlite3.Connection, entry: Entry) -> None:
        """Take an entry; write when a statement is full."""
        rows: list[Any] = self._events if isinstance(entry[1], EventRecord) else self._stages
        rows.append(entry)
        if len(rows) == ROWS_PER_STATEMENT:
            self.write(connection)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write what was taken."""
        if self._events:
            self._write_events(connection)
        if self._stages:
            self._write_stages(connection)

    def _write_events(self, connection: sqlite3.Connection) -> None:
        events, self._events = self._events, []
        values: list[Any] = []
        for epoch, r in events:
            values += (r.run_id, r.seq, r.time, r.event.name, encode_event(r.event), epoch)
        last = {(r.run_id, epoch): r.seq for epoch, r in events}
        for run_id, seq in self._insert(connection, _EVENTS[len(events)], values, len(events), last):
            self.durable[run_id] = (seq, self.durable.get(run_id, (0, 0))[1])

    def _write_stages(self, connection: sqlite3.Connection) -> None:
        stages, self._stages = self._stages, []
        values: list[Any] = []
        for epoch, r in stages:
            values += (r.run_id, r.path, r.input_hash, r.output_hash, encode_json(r.value), r.seq, epoch)
        counts = Counter((r.run_id, epoch) for epoch, r in stages)
        for run_id, count in self._insert(connection, _STAGES[len(stages)], values, len(stages), counts):
            seq, kept = self.durable.get(run_id, (0, 0))
            self.durable[run_id] = (seq, kept + count)

    def _insert(
        self,
        connection: sqlite3.Connection,
        statement: str,
        values: Sequence[Any],
        rows: int,
        places: Mapping[tuple[str, int], int],
    ) -> list[tuple[str, int]]:
        """Insert rows, note the attempts that were refused, and return the places of the others, by run."""
        lost: set[tuple[str, int]] = set()
        if connection.execute(statement, values).rowcount != rows:
            lost = _lost(connection, places)
            self.refused |= lost
        return [(run_id, place) for (run_id, epoch), place in places.items() if (run_id, epoch) not in lost]


def _lost(connection: sqlite3.Connection, owners: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
    """Return the attempts among these that no longer have their run."""
    query = "SELECT 1 FROM leases WHERE run_id = ? AND epoch = ?"
    return {owner for owner in owners if connection.execute(query, owner).fetchone() is None}


def _apply(connection: sqlite3.Connection, items: Sequence[_Item], writes: Sequence[Write]) -> Committed:
    """Write what was queued in one transaction and return what it did."""
    batch = _Batch()
    barrier = any(write.barrier for write in writes)
    if barrier:
        connection.execute("PRAGMA synchronous=FULL")
    single = len(items) < ROWS_PER_STATEMENT and _are_events(items)  # one statement is its own transaction
    if not single:
        connection.execute("BEGIN IMMEDIATE")
    try:
        for item in items:
            if isinstance(item, Write):
                batch.write(connection)
                _perform(connection, item)
            else:
                batch.add(connection, item)
        batch.write(connection)
        if not single:
            connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    if barrier:
        connection.execute("PRAGMA synchronous=NORMAL")
    return Committed(len(items) - len(writes), batch.durable, tuple(batch.refused))


def _are_events(items: Sequence[_Item]) -> bool:
    return all(not isinstance(item, Write) and isinstance(item[1], EventRecord) for item in items)


def _perform(connection: sqlite3.Connection, write: Write) -> None:
    try:
        write.result = write.fn(connection)
    except (CrucibleError, sqlite3.IntegrityError) as error:
        write.error = error


def _set_all(writes: Sequence[Write]) -> None:
    for write in writes:
        write.done.set()
