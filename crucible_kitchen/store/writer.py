"""The one thread that writes: it takes all that waits, writes it in one transaction, and reports once.

It knows entries, functions on a connection and their order; it knows no waiter. What an attempt writes that no longer
has its run is left out by the database (``schema.fenced``) and reported. Read next: ``crucible_kitchen.store.sqlite``.
"""

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import anyio
import anyio.to_thread

from crucible_kitchen.errors import CrucibleError, StorageFull, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store import schema
from crucible_kitchen.store.codec import encode_json
from crucible_kitchen.store.front import Committed, Entry
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
        self._error: StoreError | None = None
        self._thread = threading.Thread(target=self._work, name="crucible-run-store", daemon=True)

    # On the event loop.

    def start(self) -> None:
        """Start the thread; it reports to the event loop that this is called from."""
        self._wake = waker()
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue an entry; ``notice`` or ``hurry`` tells the thread."""
        self._queue.append(entry)

    def notice(self) -> None:
        """See to it that the thread looks at the queue within ``LINGER``."""
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
        # A lock used as a bell: releasing wakes the thread; one that is already free is a bell already rung.
        try:
            self._bell.release()
        except RuntimeError:
            return

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
        if self._bell.acquire(timeout=LINGER) or self._queue:
            return
        self._asleep = True
        if not self._queue:  # in this order: what is queued after this line rings the bell
            self._bell.acquire()
        self._asleep = False

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
        if done.count:
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
            self._bell.acquire()


@dataclass(slots=True)
class _Rows:
    """Rows on their way into one table, and whose they are."""

    statements: Sequence[str]
    values: list[Any] = field(default_factory=list)
    count: int = 0
    owners: dict[tuple[str, int], int] = field(default_factory=dict)
    """By run and epoch: the last seq, or the number of rows, whichever the table is reported by."""

    def write(self, connection: sqlite3.Connection, refused: dict[tuple[str, int], None]) -> Iterator[tuple[str, int]]:
        """Insert what is there, note the attempts that were refused, and yield the others, by run."""
        if not self.count:
            return
        written = connection.execute(self.statements[self.count], self.values).rowcount
        lost = _lost(connection, self.owners) if written != self.count else ()
        refused.update(dict.fromkeys(lost))
        yield from ((run_id, value) for (run_id, epoch), value in self.owners.items() if (run_id, epoch) not in lost)
        self.values, self.count, self.owners = [], 0, {}


class _Batch:
    """The entries of one transaction, written a statement at a time."""

    def __init__(self) -> None:
        self._events = _Rows(_EVENTS)
        self._stages = _Rows(_STAGES)
        self._seqs: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._refused: dict[tuple[str, int], None] = {}
        self._count = 0

    def add(self, connection: sqlite3.Connection, entry: Entry) -> None:
        """Take an entry; write when a statement is full."""
        epoch, record = entry
        self._count += 1
        owner = (record.run_id, epoch)
        if isinstance(record, EventRecord):
            rows, event = self._events, record.event
            rows.values += (record.run_id, record.seq, record.time, event.name, encode_json(event), epoch)
            rows.owners[owner] = record.seq
        else:
            rows = self._stages
            rows.values += (record.run_id, record.path, record.input_hash, record.output_hash)
            rows.values += (encode_json(record.value), record.seq, epoch)
            rows.owners[owner] = rows.owners.get(owner, 0) + 1
        rows.count += 1
        if rows.count == ROWS_PER_STATEMENT:
            self.write(connection)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write what was taken."""
        self._seqs.update(self._events.write(connection, self._refused))
        for run_id, count in self._stages.write(connection, self._refused):
            self._kept[run_id] = self._kept.get(run_id, 0) + count

    def committed(self) -> Committed:
        """Return what was done, once it is committed."""
        return Committed(self._count, self._seqs, self._kept, tuple(self._refused))


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
    return batch.committed()


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
