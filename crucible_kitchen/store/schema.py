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

__all__ = ["MIGRATIONS", "artifacts", "events", "manifests", "migrate", "prepared", "runs"]

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

_DIALECT = sqlite.dialect(paramstyle="qmark")


def prepared(statement: ClauseElement) -> str:
    """Return a statement as the driver takes it, with a question mark per value."""
    return str(statement.compile(dialect=_DIALECT))


def _create(connection: Connection) -> None:
    """Version 1: runs, events, artifacts, manifests."""
    for table in (runs, events, artifacts, manifests):
        connection.execute(CreateTable(table))
        for index in table.indexes:
            connection.execute(CreateIndex(index))


MIGRATIONS: Sequence[Callable[[Connection], None]] = (_create,)
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

    Raises:
        StoreError: the file is of a newer version.
    """
    with engine.connect() as connection:
        # Of a new file only. A commit writes whole pages: smaller ones make the commit of a single record 10 % faster.
        connection.exec_driver_sql("PRAGMA page_size=2048")
        _enter_wal(connection)
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
            if version > len(MIGRATIONS):
                raise StoreError(
                    f"the run store has schema version {version}, this version of crucible-kitchen knows up to "
                    f"{len(MIGRATIONS)}",
                    hint="upgrade crucible-kitchen, or use another --home",
                )
            for step in MIGRATIONS[version:]:
                step(connection)
            connection.exec_driver_sql(f"PRAGMA user_version={len(MIGRATIONS)}")
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")
