"""The run store's tables, and how an older file becomes a newer one.

The tables are declared once, here; the writer's prepared statements are compiled from them. To change the schema add
a step to ``MIGRATIONS``: never change one that was released. Read next: ``crucible_kitchen.store.sqlite``.
"""

import time
from collections.abc import Callable, Sequence

from sqlalchemy import Column, Connection, Engine, Float, Integer, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import CreateIndex, CreateTable, Index
from sqlalchemy.sql.expression import ClauseElement

from crucible_kitchen.errors import StoreError

__all__ = [
    "MIGRATIONS",
    "OF_A_RUN",
    "artifacts",
    "attempts",
    "checkpoints",
    "events",
    "fenced",
    "leases",
    "manifests",
    "migrate",
    "prepared",
    "runs",
    "stage_records",
]

metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    Column("key", Integer, primary_key=True),  # counts up: the order of creation
    Column("run_id", String, nullable=False, unique=True),
    Column("workflow", String, nullable=False),
    Column("status", String, nullable=False),
    Column("config", Text, nullable=False),
    Column("config_hash", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("result", Text),
    Column("error", Text),
    Index("runs_by_age", "created_at"),
)

# Clustered by its key: a run's log lies together, and reading it from a cursor is one range scan.
events = Table(
    "events",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False),
    Column("name", String, nullable=False),
    Column("data", Text, nullable=False),
    sqlite_with_rowid=False,
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("run_id", String, nullable=False),
    Column("uri", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    UniqueConstraint("run_id", "uri", "kind", "name"),
)

manifests = Table(
    "manifests",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("data", Text, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("ended_at", Float),
    Column("status", String, nullable=False),
    Column("error", Text),
    sqlite_with_rowid=False,
)

# A row for each attempt that may write, and for no other: what is inserted under another epoch is left out by the
# database itself. A table of its own, so that the look-up for every event finds a page that is always in memory.
leases = Table(
    "leases",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("until", Float, nullable=False),
    sqlite_with_rowid=False,
)

stage_records = Table(
    "stage_records",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("path", String, primary_key=True),
    Column("input_hash", String, nullable=False),
    Column("output_hash", String, nullable=False),
    Column("value", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    sqlite_with_rowid=False,
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("run_id", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("session", String, nullable=False),
    Column("place", String, nullable=False),
    Column("step", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("data", Text, nullable=False),
    Column("states", Text, nullable=False),
    Column("sha256", String, nullable=False),
    UniqueConstraint("run_id", "number"),
)

OF_A_RUN = (events, stage_records, checkpoints, artifacts, manifests, attempts, leases, runs)
"""The tables that hold what belongs to a run, each by ``run_id``."""

_DIALECT = sqlite.dialect(paramstyle="qmark")


def prepared(statement: ClauseElement) -> str:
    """Return a statement as the driver takes it, with a question mark per value."""
    return str(statement.compile(dialect=_DIALECT))


def fenced(table: Table, verb: str, rows: int) -> str:
    """Return the statement that inserts so many rows under their epochs, as the driver takes it.

    Each row is given as its columns and the epoch that writes it. A row whose run is not leased under that epoch is
    left out: check and insertion are one statement, so that no other process comes in between.
    """
    names = [column.name for column in table.columns]
    values = ", ".join(["(" + ", ".join("?" * (len(names) + 1)) + ")"] * rows)
    columns = ", ".join(f"column{i}" for i in range(1, len(names) + 1))
    return (
        f"{verb} INTO {table.name} ({', '.join(names)}) SELECT {columns} FROM (VALUES {values}) "  # noqa: S608 - our names
        f"WHERE column{len(names) + 1} = (SELECT epoch FROM leases WHERE run_id = column1)"
    )


def _create_tables(connection: Connection, tables: Sequence[Table]) -> None:
    for table in tables:
        connection.execute(CreateTable(table))
        for index in table.indexes:
            connection.execute(CreateIndex(index))


def _create(connection: Connection) -> None:
    """Version 1: runs, events, artifacts, manifests."""
    _create_tables(connection, (runs, events, artifacts, manifests))


def _attempts(connection: Connection) -> None:
    """Version 2: attempts and their leases, stages' records, checkpoints. What a run did so far was its attempt 1."""
    _create_tables(connection, (attempts, leases, stage_records, checkpoints))
    connection.exec_driver_sql(
        "INSERT INTO attempts (run_id, number, owner, started_at, seq, ended_at, status, error) "
        "SELECT run_id, 1, '{}', created_at, 0, finished_at, status, error FROM runs"
    )
    # Whoever had those that still run is not known: their leases have ended, so that the first to look closes them.
    connection.exec_driver_sql(
        "INSERT INTO leases (run_id, epoch, until) SELECT run_id, 1, 0.0 FROM runs WHERE status = 'running'"
    )


MIGRATIONS: Sequence[Callable[[Connection], None]] = (_create, _attempts)
"""Step ``i`` takes a file of version ``i`` to version ``i + 1``; an empty file has version 0."""


def _enter_wal(connection: Connection) -> None:
    # The change of mode is the one statement that does not wait for a lock by itself.
    deadline = time.monotonic() + 30.0
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            return
        except OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def migrate(engine: Engine) -> None:
    """Bring a file to this version's schema, whole or not at all; processes that start together take turns.

    A file that is up to date, or newer, is not written to.

    Raises:
        StoreError: the file is of a newer version.
    """
    with engine.connect() as connection:
        if _version(connection) == len(MIGRATIONS):
            return
        # Of a new file only. A commit writes whole pages: smaller ones make the commit of a single record 10 % faster.
        connection.exec_driver_sql("PRAGMA page_size=2048")
        _enter_wal(connection)
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            for step in MIGRATIONS[_version(connection) :]:
                step(connection)
            connection.exec_driver_sql(f"PRAGMA user_version={len(MIGRATIONS)}")
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")


def _version(connection: Connection) -> int:
    version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the run store has schema version {version}, this version of crucible-kitchen knows up to "
            f"{len(MIGRATIONS)}",
            hint="upgrade crucible-kitchen, or use another --home",
        )
    return version
