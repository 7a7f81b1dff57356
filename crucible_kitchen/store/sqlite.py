"""The run store in a SQLite file: one writer thread with group commit, one reader.

It knows its tables and its two threads; it knows no engine and no telemetry. Read next:
``crucible_kitchen.store.writer`` (how records are written) and ``.schema`` (the tables).
"""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError

from crucible_kitchen.errors import Conflict, LeaseLost, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store import changes, queries, schema
from crucible_kitchen.store.base import TTL
from crucible_kitchen.store.codec import encode_json, sealed
from crucible_kitchen.store.front import Entry, JournalFront, fresh
from crucible_kitchen.store.leases import run_ended
from crucible_kitchen.store.owner import Owner
from crucible_kitchen.store.records import Attempt, Checkpoint, FinalStatus, Lease, RunRecord, RunStatus, StageRecord
from crucible_kitchen.store.writer import Write, Writer, translated
from crucible_kitchen.types import BlobRef, JsonObject
from crucible_kitchen.workers import Lane

__all__ = ["SqliteRunStore"]

R = TypeVar("R")

_BUSY_SECONDS = 30.0
_SMALLEST = 512  # bytes of the smallest page that SQLite has


class SqliteRunStore(JournalFront):
    """A run store in one file, in WAL mode; other processes may read and write it at the same time.

    One owner: what an attempt writes carries its epoch, and the statement that inserts it leaves it out unless the
    leases table has that epoch for that run. SQLite lets one process write at a time, so that there is no moment
    between the check and the change. A lease's end and its owner's death only decide who may take a run, never who may
    write to it: a clock that jumps costs a wait or an attempt, not a record.

    Durability: records are committed with ``PRAGMA synchronous=NORMAL``. A commit is then in the operating system's
    hands: it survives the death of this process at any moment, ``kill -9`` included, and costs no wait for the disk
    (tens of microseconds instead of milliseconds). A power loss or a crash of the system may lose the newest commits,
    never their order nor the file. Ends of runs and checkpoints are committed with ``synchronous=FULL``, which takes
    everything written before along to the disk: a run that was reported as finished, a checkpoint that training went
    on from, survive a power loss too.

    Args:
        path: the file; its directory is created.
        limit: how many records may wait for the writer before ``drain`` makes a producer wait.
        clock: seconds since the epoch, for leases and ends.

    Example::

        async with SqliteRunStore(home / "runs.db") as store:
            await store.create_run(RunRecord(run_id, "supervised", config=config), manifest=manifest)
            store.append([record])
            await store.flush(run_id, record.seq)
    """

    def __init__(self, path: Path, *, limit: int = 50_000, clock: Callable[[], float] = time.time) -> None:
        super().__init__(limit)
        self._path = path
        self._clock = clock
        self._reader = Lane("crucible-run-store-reader")
        self._engine: Engine | None = None
        self._writer: Writer | None = None

    # The journal's side of the writer.

    def _enqueue(self, entry: Entry) -> None:
        assert self._writer is not None
        self._writer.put(entry)

    def _hurry(self) -> None:
        assert self._writer is not None
        self._writer.hurry()

    # Opening and closing.

    async def open(self) -> None:
        """See ``RunStore.open``."""
        try:
            self._engine = await self._reader.run(_open_engine, self._path)
        except (SQLAlchemyError, OSError) as error:
            await self._reader.aclose()
            raise translated(error, "opening the run store") from error
        except BaseException:
            await self._reader.aclose()
            raise
        self._writer = Writer(lambda: _connect(self._path), self._committed, self._fail)
        self._writer.start()
        self._ready()

    async def aclose(self) -> None:
        """See ``RunStore.aclose``."""
        writer, self._writer = self._writer, None
        held = self._leases() if self._error is None else []
        closed = StoreError("the run store is closed")
        self._error = self._error or closed
        if writer is not None:
            if held:
                with suppress(StoreError):
                    await writer.run(Write(lambda connection: changes.end_leases(connection, held)))
            await writer.aclose()
        self._fail(closed)
        engine, self._engine = self._engine, None
        if engine is not None:
            await self._reader.run(engine.dispose)
        await self._reader.aclose()

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
        record = replace(record, status="running", finished_at=None, result=None, error=None)
        owner = owner or Owner.here()
        text = None if manifest is None else encode_json(manifest)

        def create(connection: sqlite3.Connection) -> Lease:
            now = self._clock()
            return changes.create_run(connection, record, owner, now, now + ttl, text)

        try:
            lease = await self._write(create)
        except sqlite3.IntegrityError:
            raise Conflict(f"the run {record.run_id!r} exists already") from None
        self._opened(lease)
        return lease

    async def open_attempt(
        self, run_id: str, owner: Owner | None = None, ttl: float = TTL, *, manifest: JsonObject | None = None
    ) -> Lease:
        """See ``RunStore.open_attempt``."""
        owner = owner or Owner.here()
        text = None if manifest is None else encode_json(manifest)

        def begin(connection: sqlite3.Connection) -> Lease:
            now = self._clock()
            return changes.begin(connection, run_id, owner, now, now + ttl, text)

        lease = await self._write(begin)
        self._opened(lease)
        return lease

    async def renew(self, lease: Lease, ttl: float = TTL) -> Lease:
        """See ``RunStore.renew``."""
        try:
            return await self._write(lambda connection: changes.renew(connection, lease, self._clock() + ttl))
        except LeaseLost:
            raise self._lost(lease.run_id, lease.epoch) from None

    async def finish_run(
        self, run_id: str, status: FinalStatus, result: JsonObject, error: JsonObject | None = None
    ) -> None:
        """See ``RunStore.finish_run``."""
        given = encode_json(result)
        broken = None if error is None else encode_json(error)
        now = self._clock()
        await self._write_own(run_id, lambda c: changes.finish(c, run_id, status, now, given, broken), barrier=True)
        self._closed(run_id, run_ended(run_id, status))

    async def attempts(self, run_id: str) -> list[Attempt]:
        """See ``RunStore.attempts``."""
        return await self._query(lambda c: queries.attempts(c, run_id))

    async def reconcile(self) -> list[RunRecord]:
        """See ``RunStore.reconcile``."""
        found = await self._query(lambda c: queries.orphans(c, self._clock()))
        if not found:  # looking neither waits for a writer nor needs room on the disk
            return []
        crashed = await self._write(lambda connection: changes.crash_orphans(connection, found, self._clock()))
        return await self._query(lambda c: [queries.run(c, run_id) for run_id in crashed])

    async def delete_run(self, run_id: str) -> None:
        """See ``RunStore.delete_run``."""
        await self._write(lambda connection: changes.delete_run(connection, run_id, self._clock()))

    # What an attempt leaves.

    async def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See ``RunStore.put_checkpoint``."""
        kept = sealed(checkpoint)
        try:
            await self._write_own(
                kept.run_id, lambda c: changes.put_checkpoint(c, kept), barrier=True, epoch=checkpoint.epoch
            )
        except sqlite3.IntegrityError:
            raise Conflict(f"the run {kept.run_id!r} has a checkpoint {kept.number} already") from None

    async def drop_checkpoint(self, run_id: str, number: int) -> None:
        """See ``RunStore.drop_checkpoint``."""
        epoch = self._current(run_id)
        await self._write(lambda connection: changes.drop_checkpoint(connection, run_id, epoch, number))

    async def put_artifact(self, run_id: str, artifact: BlobRef) -> None:
        """See ``RunStore.put_artifact``."""
        await self._write_own(run_id, lambda c: changes.put_artifact(c, run_id, artifact))

    async def _write_own(
        self,
        run_id: str,
        fn: Callable[[sqlite3.Connection], None],
        *,
        barrier: bool = False,
        epoch: int | None = None,
    ) -> None:
        """Write as the attempt that has a run here, or as the one given."""
        self._check()
        epoch = self._epoch(run_id) if epoch is None else epoch

        def owned(connection: sqlite3.Connection) -> None:
            changes.own(connection, run_id, epoch)
            fn(connection)

        try:
            await self._write(owned, barrier=barrier)
        except LeaseLost:
            raise self._lost(run_id, epoch) from None

    async def _write(self, fn: Callable[[sqlite3.Connection], R], *, barrier: bool = False) -> R:
        self._check()
        assert self._writer is not None
        try:
            return await self._writer.run(Write(fn, barrier=barrier))  # type: ignore[no-any-return]
        except StoreError as error:
            self._check()
            raise fresh(error) from None

    # Reading.

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        """See ``RunStore.read``."""
        return await self._query(lambda c: queries.events(c, run_id, after, limit))

    async def records(self, run_id: str) -> list[StageRecord]:
        """See ``RunStore.records``."""
        return await self._query(lambda c: queries.stage_records(c, run_id))

    async def run(self, run_id: str) -> RunRecord:
        """See ``RunStore.run``."""
        return await self._query(lambda c: queries.run(c, run_id))

    async def runs(
        self,
        limit: int | None = 50,
        status: RunStatus | None = None,
        workflow: str | None = None,
        since: float | None = None,
        before: float | None = None,
    ) -> list[RunRecord]:
        """See ``RunStore.runs``."""
        return await self._query(lambda c: queries.runs(c, limit, status, workflow, since, before))

    async def checkpoints(self, run_id: str, session: str | None = None) -> list[Checkpoint]:
        """See ``RunStore.checkpoints``."""
        return await self._query(lambda c: queries.checkpoints(c, run_id, session))

    async def artifacts(self, run_id: str) -> list[BlobRef]:
        """See ``RunStore.artifacts``."""
        return await self._query(lambda c: queries.artifacts(c, run_id))

    async def manifest(self, run_id: str) -> JsonObject | None:
        """See ``RunStore.manifest``."""
        return await self._query(lambda c: queries.manifest(c, run_id))

    async def _query(self, fn: Callable[[Connection], R]) -> R:
        engine = self._engine
        if engine is None:
            self._check()
            raise StoreError("the run store is not open")

        def ask() -> R:
            try:
                with engine.connect() as connection:
                    return fn(connection)
            except SQLAlchemyError as error:
                raise translated(error, "reading the run store") from error

        return await self._reader.run(ask)


def _open_engine(path: Path) -> Engine:
    """Create or migrate the file and return the reader's engine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_remains(path)
    engine = create_engine(
        f"sqlite+pysqlite:///{path}", isolation_level="AUTOCOMMIT", connect_args={"timeout": _BUSY_SECONDS}
    )
    try:
        schema.migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _refuse_remains(path: Path) -> None:
    """Refuse what is left of a store that was cut off: SQLite would take it for a new file and write over it.

    Raises:
        StoreError: the file is shorter than any that SQLite wrote, or gone while its log is there.
    """
    log = path.with_name(f"{path.name}-wal")
    logged = log.exists() and log.stat().st_size > 0  # first: a new file is written before its log is
    size = path.stat().st_size if path.exists() else 0
    if 0 < size < _SMALLEST or (logged and not size):
        raise StoreError(
            f"the run store is damaged: of {path.name} {size} bytes are left",
            hint="restore it from a copy, or use another --home",
        )


def _connect(path: Path) -> sqlite3.Connection:
    """Open the writer's connection, in the writer's thread."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, cached_statements=256)
    with closing(connection.execute("PRAGMA synchronous=NORMAL")):
        return connection
