"""The run store in a SQLite file: one writer thread with group commit, one reader.

It knows its tables and its two threads; it knows no engine and no telemetry. Read next:
``crucible_kitchen.store.writer`` (how records are written) and ``.schema`` (the tables).
"""

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Engine, Row, create_engine, select
from sqlalchemy.exc import SQLAlchemyError

from crucible_kitchen.errors import Conflict, RunNotFound, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store import schema
from crucible_kitchen.store.base import FinalStatus, RunRecord, RunStatus, only_run
from crucible_kitchen.store.codec import decode_event, encode_json
from crucible_kitchen.store.front import JournalFront
from crucible_kitchen.store.writer import Write, Writer, translated
from crucible_kitchen.types import BlobRef, JsonObject
from crucible_kitchen.workers import Lane

__all__ = ["SqliteRunStore"]

R = TypeVar("R")

_BUSY_SECONDS = 30.0
_INSERT_EVENT = schema.prepared(schema.events.insert())
_RUN_COLUMNS = ("run_id", "workflow", "status", "config", "config_hash", "created_at", "finished_at", "result", "error")
_INSERT_RUN = schema.prepared(schema.runs.insert().values(dict.fromkeys(_RUN_COLUMNS)))
_ARTIFACT_COLUMNS = ("run_id", "uri", "sha256", "size", "kind", "name")
_INSERT_ARTIFACT = schema.prepared(
    schema.artifacts.insert().prefix_with("OR IGNORE").values(dict.fromkeys(_ARTIFACT_COLUMNS))
)
_INSERT_MANIFEST = schema.prepared(schema.manifests.insert().prefix_with("OR REPLACE"))


class SqliteRunStore(JournalFront):
    """A run store in one file, in WAL mode; other processes may read and write it at the same time.

    Durability: records are committed with ``PRAGMA synchronous=NORMAL``. A commit is then in the operating system's
    hands: it survives the death of this process at any moment, ``kill -9`` included, and costs no wait for the disk
    (tens of microseconds instead of milliseconds). A power loss or a crash of the system may lose the newest commits,
    never their order nor the file. What ends a run is committed with ``synchronous=FULL``, which takes everything
    written before along to the disk: a run that was reported as finished survives a power loss too.

    Args:
        path: the file; its directory is created.
        limit: how many records may wait for the writer before ``drain`` makes a producer wait.
        clock: seconds since the epoch, for ``finished_at``.

    Example::

        async with SqliteRunStore(home / "runs.db") as store:
            await store.create_run(RunRecord(run_id, "supervised", config=config))
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

    def _enqueue(self, record: EventRecord) -> None:
        assert self._writer is not None
        self._writer.put(record)

    def _notice(self) -> None:
        assert self._writer is not None
        self._writer.notice()

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
        self._writer = Writer(lambda: _connect(self._path), _INSERT_EVENT, self._committed, self._fail)
        self._writer.start()
        self._ready()

    async def aclose(self) -> None:
        """See ``RunStore.aclose``."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.aclose()
        self._fail(StoreError("the run store is closed"))
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

    # Writing.

    async def create_run(self, record: RunRecord) -> None:
        """See ``RunStore.create_run``."""
        values = [getattr(record, column) for column in _RUN_COLUMNS]
        row = [encode_json(value) if isinstance(value, dict) else value for value in values]
        try:
            await self._write(lambda connection: connection.execute(_INSERT_RUN, row))
        except sqlite3.IntegrityError:
            raise Conflict(f"the run {record.run_id!r} exists already") from None
        self._opened(record.run_id)

    async def finish_run(
        self, run_id: str, status: FinalStatus, result: JsonObject, error: JsonObject | None = None
    ) -> None:
        """See ``RunStore.finish_run``."""
        row = (status, encode_json(result), error and encode_json(error), self._clock(), run_id)

        def finish(connection: sqlite3.Connection) -> None:
            before = _status(connection, run_id)
            if before != "running":
                raise Conflict(f"the run {run_id!r} has already ended: {before}")
            connection.execute(
                "UPDATE runs SET status = ?, result = ?, error = ?, finished_at = ? WHERE run_id = ?", row
            )

        await self._write(finish, barrier=True)

    async def put_artifact(self, run_id: str, artifact: BlobRef) -> None:
        """See ``RunStore.put_artifact``."""
        row = (run_id, artifact.uri, artifact.sha256, artifact.size, artifact.kind, artifact.name)

        def put(connection: sqlite3.Connection) -> None:
            _status(connection, run_id)
            connection.execute(_INSERT_ARTIFACT, row)

        await self._write(put)

    async def put_manifest(self, run_id: str, manifest: JsonObject) -> None:
        """See ``RunStore.put_manifest``."""
        text = encode_json(manifest)

        def put(connection: sqlite3.Connection) -> None:
            _status(connection, run_id)
            connection.execute(_INSERT_MANIFEST, (run_id, text))

        await self._write(put)

    async def _write(self, fn: Callable[[sqlite3.Connection], Any], *, barrier: bool = False) -> None:
        self._check()
        assert self._writer is not None
        try:
            await self._writer.run(Write(fn, barrier=barrier))
        except StoreError as error:
            self._check()
            raise error from None

    # Reading.

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        """See ``RunStore.read``."""
        table = schema.events
        query = select(table).where(table.c.run_id == run_id, table.c.seq > after).order_by(table.c.seq).limit(limit)
        return await self._query(lambda c: [decode_event(*row) for row in c.execute(query)])

    async def run(self, run_id: str) -> RunRecord:
        """See ``RunStore.run``."""
        table = schema.runs
        exact = select(table).where(table.c.run_id == run_id)
        end = run_id + "\U0010ffff"  # after everything that begins with the prefix
        prefix = select(table).where(table.c.run_id > run_id, table.c.run_id < end).order_by(table.c.run_id).limit(4)

        def find(connection: Connection) -> RunRecord:
            rows = connection.execute(exact).all() or connection.execute(prefix).all()
            only_run(run_id, [row.run_id for row in rows])
            return _run_record(rows[0])

        return await self._query(find)

    async def runs(
        self, limit: int = 50, status: RunStatus | None = None, workflow: str | None = None
    ) -> list[RunRecord]:
        """See ``RunStore.runs``."""
        table = schema.runs
        query = select(table).order_by(table.c.created_at.desc(), table.c.key.desc()).limit(limit)
        if status is not None:
            query = query.where(table.c.status == status)
        if workflow is not None:
            query = query.where(table.c.workflow == workflow)
        return await self._query(lambda c: [_run_record(row) for row in c.execute(query)])

    async def artifacts(self, run_id: str) -> list[BlobRef]:
        """See ``RunStore.artifacts``."""
        table = schema.artifacts
        query = select(table).where(table.c.run_id == run_id).order_by(table.c.key)
        return await self._query(
            lambda c: [BlobRef(row.uri, row.sha256, row.size, row.kind, row.name) for row in c.execute(query)]
        )

    async def manifest(self, run_id: str) -> JsonObject | None:
        """See ``RunStore.manifest``."""
        query = select(schema.manifests.c.data).where(schema.manifests.c.run_id == run_id)
        text = await self._query(lambda c: c.execute(query).scalar_one_or_none())
        return None if text is None else json.loads(text)

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
    engine = create_engine(
        f"sqlite+pysqlite:///{path}", isolation_level="AUTOCOMMIT", connect_args={"timeout": _BUSY_SECONDS}
    )
    try:
        schema.migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _connect(path: Path) -> sqlite3.Connection:
    """Open the writer's connection, in the writer's thread."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, cached_statements=256)
    with closing(connection.execute("PRAGMA synchronous=NORMAL")):
        return connection


def _status(connection: sqlite3.Connection, run_id: str) -> str:
    row = connection.execute("SELECT status FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    if row is None:
        raise RunNotFound(f"there is no run {run_id!r}")
    return str(row[0])


def _run_record(row: Row[Any]) -> RunRecord:
    return RunRecord(
        run_id=row.run_id,
        workflow=row.workflow,
        status=row.status,
        config=json.loads(row.config),
        config_hash=row.config_hash,
        created_at=row.created_at,
        finished_at=row.finished_at,
        result=row.result and json.loads(row.result),
        error=row.error and json.loads(row.error),
    )
