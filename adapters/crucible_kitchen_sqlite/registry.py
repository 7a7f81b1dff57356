"""The model registry in one SQLite file, shared by every process that uses the same home.

It knows the registry port and SQL; it knows no run and no blob. Each method is one transaction in one thread of its
own. Read next: ``crucible_kitchen.ports.model_registry`` and ``crucible_kitchen_sqlite.schema``.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from crucible_kitchen.errors import (
    ConfigError,
    Conflict,
    StorageFull,
    StoreError,
    VersionNotFound,
)
from crucible_kitchen.types import JsonObject, ModelVersion
from crucible_kitchen.workers import Lane
from crucible_kitchen_sqlite.schema import open_database

__all__ = ["SqliteModelRegistry"]

R = TypeVar("R")

STAGES = ("candidate", "staging", "production", "archived")
_PROMOTED = ("staging", "production")
_COLUMNS = "name, version, uri, stage, lineage, metrics, created_at, synthetic"


class SqliteModelRegistry:
    """Versions of models in ``home/registry.db``.

    Every change takes the file's write lock before it reads (``BEGIN IMMEDIATE``), so numbers have no gaps and an
    alias has one mover, across threads and processes. A commit is on the disk before a method returns
    (``synchronous=FULL``): registrations are rare and meant to last.

    Args:
        home: the directory of the file; it is created.
    """

    synthetic = False

    def __init__(self, home: Path) -> None:
        self._path = Path(home) / "registry.db"
        self._lane = Lane("crucible-model-registry")
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def register(
        self,
        name: str,
        uri: str,
        *,
        lineage: Mapping[str, Any],
        metrics: Mapping[str, Any],
        idempotency_key: str,
        synthetic: bool = False,
    ) -> ModelVersion:
        """See ``ModelRegistry.register``."""
        if not name or ":" in name:
            raise ConfigError(f"a model cannot be named {name!r}", hint="a name is not empty and has no colon")
        known, measured = _json(lineage, "lineage"), _json(metrics, "metrics")

        def write(connection: sqlite3.Connection) -> ModelVersion:
            again = connection.execute(
                f"SELECT {_COLUMNS} FROM versions WHERE idempotency_key = ?",  # noqa: S608 - a constant
                (idempotency_key,),
            ).fetchone()
            if again is not None:
                return _version(again)
            (number,) = connection.execute(
                "INSERT INTO models (name, last_version) VALUES (?, 1) "
                "ON CONFLICT (name) DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
                (name,),
            ).fetchone()
            row = (name, number, uri, STAGES[0], known, measured, time.time(), int(synthetic))
            connection.execute(
                f"INSERT INTO versions ({_COLUMNS}, idempotency_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                (*row, idempotency_key or None),
            )
            return _version(row)

        return await self._transact(write)

    async def get(self, name: str, version: int | str) -> ModelVersion:
        """See ``ModelRegistry.get``; a number may be given as text."""
        return await self._transact(lambda connection: _get(connection, name, version), write=False)

    async def versions(self, name: str | None = None) -> list[ModelVersion]:
        """See ``ModelRegistry.versions``."""

        def read(connection: sqlite3.Connection) -> list[ModelVersion]:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM versions WHERE ?1 IS NULL OR name = ?1 ORDER BY key",  # noqa: S608
                (name,),
            )
            return [_version(row) for row in rows]

        return await self._transact(read, write=False)

    async def set_alias(self, name: str, alias: str, version: int, *, expected: int | None) -> None:
        """See ``ModelRegistry.set_alias``."""
        if not alias or alias.isdecimal():
            raise ConfigError(f"an alias cannot be {alias!r}", hint="a number would be read as a version")

        def write(connection: sqlite3.Connection) -> None:
            _get(connection, name, version)
            row = connection.execute(
                "SELECT version FROM aliases WHERE name = ? AND alias = ?", (name, alias)
            ).fetchone()
            found = None if row is None else row[0]
            if found != expected:
                raise Conflict(
                    f"the alias {name}:{alias} points at {found}, not at {expected}",
                    hint="read it again and decide anew",
                )
            connection.execute(
                "INSERT INTO aliases (name, alias, version) VALUES (?, ?, ?) "
                "ON CONFLICT (name, alias) DO UPDATE SET version = excluded.version",
                (name, alias, version),
            )

        await self._transact(write)

    async def set_stage(self, name: str, version: int, stage: str) -> ModelVersion:
        """See ``ModelRegistry.set_stage``.

        Raises:
            ConfigError: there is no such stage.
        """
        if stage not in STAGES:
            raise ConfigError(f"there is no stage {stage!r}", hint=f"stages: {', '.join(STAGES)}")

        def write(connection: sqlite3.Connection) -> ModelVersion:
            found = _get(connection, name, version)
            if found.synthetic and stage in _PROMOTED:
                raise Conflict(
                    f"{found.id} is synthetic and cannot become {stage}", hint="train it with a real backend"
                )
            connection.execute("UPDATE versions SET stage = ? WHERE name = ? AND version = ?", (stage, name, version))
            return _get(connection, name, version)

        return await self._transact(write)

    async def lineage(self, name: str, version: int | str) -> Sequence[ModelVersion]:
        """See ``ModelRegistry.lineage``; it ends at a parent that is not registered here, or that came before."""

        def read(connection: sqlite3.Connection) -> list[ModelVersion]:
            chain = [_get(connection, name, version)]
            while True:
                parent, _, number = str(chain[-1].lineage.get("parent_model") or "").rpartition(":")
                try:
                    found = _get(connection, parent, number)
                except VersionNotFound:
                    return chain
                if found.id in {ancestor.id for ancestor in chain}:
                    return chain
                chain.append(found)

        return await self._transact(read, write=False)

    async def delete(self, name: str, version: int) -> None:
        """See ``ModelRegistry.delete``; aliases of the version go with it."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM aliases WHERE name = ? AND version = ?", (name, version))
            connection.execute("DELETE FROM versions WHERE name = ? AND version = ?", (name, version))

        await self._transact(write)

    def public_options(self) -> JsonObject:
        """See ``Adapter``; the home is the kitchen's."""
        return {}

    async def aclose(self) -> None:
        """See ``Adapter``."""
        if not self._closed:
            self._closed = True
            await self._lane.run(self._close)
            await self._lane.aclose()

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    async def _transact(self, fn: Callable[[sqlite3.Connection], R], *, write: bool = True) -> R:
        if self._closed:
            raise StoreError("the model registry is closed")
        return await self._lane.run(self._in_thread, fn, write)

    def _in_thread(self, fn: Callable[[sqlite3.Connection], R], write: bool) -> R:
        with _translated():
            connection = self._connection
            if connection is None:
                connection = self._connection = open_database(self._path)
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                result = fn(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the database's errors into the project's."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            raise StorageFull("the disk is full: the model registry is unchanged", hint="free space") from error
        raise StoreError(f"the model registry failed: {error}") from error
    except OSError as error:
        raise StoreError(f"the model registry cannot be opened: {error.strerror}") from error


def _get(connection: sqlite3.Connection, name: str, version: int | str) -> ModelVersion:
    number: Any = version
    if isinstance(version, str) and not version.isdecimal():
        row = connection.execute("SELECT version FROM aliases WHERE name = ? AND alias = ?", (name, version)).fetchone()
        number = None if row is None else row[0]
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM versions WHERE name = ? AND version = ?",  # noqa: S608
        (name, number),
    ).fetchone()
    if row is None:
        raise VersionNotFound(f"the registry has no model version {name}:{version}")
    return _version(row)


def _json(value: Mapping[str, Any], what: str) -> str:
    try:
        return json.dumps(dict(value), allow_nan=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} cannot be written as JSON: {error}") from error


def _version(row: Sequence[Any]) -> ModelVersion:
    name, version, uri, stage, lineage, metrics, created_at, synthetic = row
    return ModelVersion(
        name, version, uri, stage, json.loads(lineage), json.loads(metrics), created_at, bool(synthetic)
    )
