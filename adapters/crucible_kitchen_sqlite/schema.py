"""The registry's tables and their version.

To change them add a step to ``MIGRATIONS``; a released step never changes. Read next:
``crucible_kitchen_sqlite.registry``.
"""

import sqlite3
import time
from pathlib import Path

from crucible_kitchen.errors import StoreError

__all__ = ["MIGRATIONS", "open_database"]

_BUSY_SECONDS = 30.0

# ``models.last_version`` counts what was ever registered, so that a deleted number is not used again.
_TABLES = (
    "CREATE TABLE models (name TEXT PRIMARY KEY, last_version INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE versions (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        version INTEGER NOT NULL,
        uri TEXT NOT NULL,
        stage TEXT NOT NULL,
        lineage TEXT NOT NULL,
        metrics TEXT NOT NULL,
        created_at REAL NOT NULL,
        synthetic INTEGER NOT NULL,
        idempotency_key TEXT UNIQUE,
        UNIQUE (name, version)
    )""",
    """CREATE TABLE aliases (
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        version INTEGER NOT NULL,
        PRIMARY KEY (name, alias)
    ) WITHOUT ROWID""",
)

MIGRATIONS = (_TABLES,)
"""Step ``i`` takes a file of version ``i`` to version ``i + 1``; an empty file has version 0."""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the registry's file, creating or migrating it; processes that start together take turns.

    Raises:
        StoreError: the file is of a newer version.
        sqlite3.Error: it is no database, or cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        _enter_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the model registry has schema version {version}, this version of crucible-kitchen knows up to "
                f"{len(MIGRATIONS)}",
                hint="upgrade crucible-kitchen, or use another --home",
            )
        for step in MIGRATIONS[version:]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.close()  # rolls back
        raise
    return connection


def _enter_wal(connection: sqlite3.Connection) -> None:
    # The change of mode is the one statement that does not wait for a lock by itself.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
