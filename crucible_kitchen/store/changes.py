"""What each write to the SQLite store does, as functions of the writer's connection.

Each runs inside a transaction that holds the file's one write lock: nothing happens between its check and its change,
in this process or any other. Each checks everything before it changes anything. They know no thread and no waiter.
Read next: ``crucible_kitchen.store.schema``.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from crucible_kitchen.errors import RunNotFound
from crucible_kitchen.store import schema
from crucible_kitchen.store.codec import encode_json
from crucible_kitchen.store.leases import GIVEN_UP, held, lease_lost, orphaned, run_ended, run_live
from crucible_kitchen.store.owner import Owner
from crucible_kitchen.store.records import Checkpoint, FinalStatus, Lease, RunRecord
from crucible_kitchen.types import BlobRef

__all__ = [
    "begin",
    "crash_orphans",
    "create_run",
    "delete_run",
    "drop_checkpoint",
    "end_leases",
    "finish",
    "own",
    "put_artifact",
    "put_checkpoint",
    "renew",
]

_RUN_COLUMNS = ("run_id", "workflow", "status", "config", "config_hash", "created_at", "finished_at", "result", "error")
_ARTIFACT_COLUMNS = ("run_id", "uri", "sha256", "size", "kind", "name")
_CHECKPOINT_COLUMNS = tuple(column.name for column in schema.checkpoints.columns if column.name != "key")


def _insert(table: Any, columns: Sequence[str], prefix: str = "") -> str:
    statement = table.insert().values(dict.fromkeys(columns))
    return schema.prepared(statement.prefix_with(prefix) if prefix else statement)


_INSERT_RUN = _insert(schema.runs, _RUN_COLUMNS)
_INSERT_ARTIFACT = _insert(schema.artifacts, _ARTIFACT_COLUMNS, "OR IGNORE")
_INSERT_MANIFEST = _insert(schema.manifests, ("run_id", "data"), "OR REPLACE")
_INSERT_CHECKPOINT = _insert(schema.checkpoints, _CHECKPOINT_COLUMNS)


def own(connection: sqlite3.Connection, run_id: str, epoch: int | None) -> None:
    """Check that an attempt has its run; every write of an attempt begins with it.

    Raises:
        RunNotFound: there is no such run.
        RunEnded: it has ended, and was not opened here.
        LeaseLost: another attempt has it, or none.
    """
    row = connection.execute("SELECT epoch FROM leases WHERE run_id = ?", (run_id,)).fetchone()
    if row is not None and row[0] == epoch:
        return
    status = _status(connection, run_id)
    if row is None and epoch is None:
        raise run_ended(run_id, status)
    raise lease_lost(run_id, epoch)


def create_run(
    connection: sqlite3.Connection, record: RunRecord, owner: Owner, now: float, until: float, manifest: str | None
) -> Lease:
    """Insert a run, its manifest and its first attempt."""
    row = [getattr(record, column) for column in _RUN_COLUMNS]
    connection.execute(_INSERT_RUN, [encode_json(value) if isinstance(value, dict) else value for value in row])
    _put_manifest(connection, record.run_id, manifest)
    return _begin(connection, Lease(record.run_id, 1, until, 0), owner, now)


def begin(
    connection: sqlite3.Connection, run_id: str, owner: Owner, now: float, until: float, manifest: str | None
) -> Lease:
    """Open the next attempt of a run, over one that has lost its owner."""
    status = _status(connection, run_id)
    if status == "running":
        _take(connection, run_id, now)
    elif status == "completed":
        raise run_ended(run_id, status)
    query = (
        "SELECT (SELECT MAX(number) FROM attempts WHERE run_id = ?1), (SELECT MAX(seq) FROM events WHERE run_id = ?1)"
    )
    last, seq = connection.execute(query, (run_id,)).fetchone()
    lease = _begin(connection, Lease(run_id, last + 1, until, seq or 0), owner, now)
    _put_manifest(connection, run_id, manifest)
    connection.execute(
        "UPDATE runs SET status = 'running', finished_at = NULL, result = NULL, error = NULL WHERE run_id = ?",
        (run_id,),
    )
    return lease


def renew(connection: sqlite3.Connection, lease: Lease, until: float) -> Lease:
    """Move a lease's end, never back."""
    own(connection, lease.run_id, lease.epoch)
    connection.execute("UPDATE leases SET until = MAX(until, ?) WHERE run_id = ?", (until, lease.run_id))
    row = connection.execute("SELECT until FROM leases WHERE run_id = ?", (lease.run_id,)).fetchone()
    return replace(lease, until=row[0])


def end_leases(connection: sqlite3.Connection, leases: Sequence[tuple[str, int]]) -> None:
    """End leases before their time: nobody will write under them any more."""
    for run_id, epoch in leases:
        change = "UPDATE leases SET until = ? WHERE run_id = ? AND epoch = ?"
        connection.execute(change, (GIVEN_UP, run_id, epoch))


def finish(
    connection: sqlite3.Connection,
    run_id: str,
    status: FinalStatus,
    now: float,
    result: str | None = None,
    error: str | None = None,
) -> None:
    """End the attempt that has a run, and the run; ``own`` or ``_take`` comes before."""
    connection.execute(
        "UPDATE attempts SET ended_at = ?, status = ?, error = ? WHERE run_id = ? "
        "AND number = (SELECT epoch FROM leases WHERE leases.run_id = attempts.run_id)",
        (now, status, error, run_id),
    )
    connection.execute("DELETE FROM leases WHERE run_id = ?", (run_id,))
    connection.execute(
        "UPDATE runs SET status = ?, result = ?, error = ?, finished_at = ? WHERE run_id = ?",
        (status, result, error, now, run_id),
    )


def crash_orphans(connection: sqlite3.Connection, run_ids: Sequence[str], now: float) -> list[str]:
    """End the attempts that have these runs as crashed, where they are orphans, and return their runs."""
    found = []
    for run_id in run_ids:
        row = _leased(connection, run_id)
        if row is not None and orphaned(_owner(row[0]), row[2], now):
            finish(connection, run_id, "crashed", now)
            found.append(run_id)
    return found


def delete_run(connection: sqlite3.Connection, run_id: str, now: float) -> None:
    """Delete a run that nobody has."""
    if _status(connection, run_id) == "running":
        _take(connection, run_id, now)
    for table in schema.OF_A_RUN:
        connection.execute(f"DELETE FROM {table.name} WHERE run_id = ?", (run_id,))  # noqa: S608 - our own names


def put_artifact(connection: sqlite3.Connection, run_id: str, artifact: BlobRef) -> None:
    """Insert an artifact, once."""
    row = (run_id, artifact.uri, artifact.sha256, artifact.size, artifact.kind, artifact.name)
    connection.execute(_INSERT_ARTIFACT, row)


def put_checkpoint(connection: sqlite3.Connection, checkpoint: Checkpoint) -> None:
    """Insert a checkpoint."""
    row = [getattr(checkpoint, column) for column in _CHECKPOINT_COLUMNS]
    connection.execute(_INSERT_CHECKPOINT, [encode_json(v) if isinstance(v, dict) else v for v in row])


def drop_checkpoint(connection: sqlite3.Connection, run_id: str, epoch: int | None, number: int) -> None:
    """Delete a checkpoint, and its states from the artifacts, of a run that has ended, or that the attempt has."""
    if _status(connection, run_id) == "running":
        own(connection, run_id, epoch)
    connection.execute(
        "DELETE FROM artifacts WHERE run_id = ?1 AND kind = 'checkpoint' AND instr("
        "(SELECT states FROM checkpoints WHERE run_id = ?1 AND number = ?2), json_quote(uri))",
        (run_id, number),
    )
    connection.execute("DELETE FROM checkpoints WHERE run_id = ? AND number = ?", (run_id, number))


def _put_manifest(connection: sqlite3.Connection, run_id: str, text: str | None) -> None:
    """Insert a manifest, or put it in the place of another; None leaves what is there."""
    if text is not None:
        connection.execute(_INSERT_MANIFEST, (run_id, text))


def _begin(connection: sqlite3.Connection, lease: Lease, owner: Owner, now: float) -> Lease:
    connection.execute(
        "INSERT INTO attempts (run_id, number, owner, started_at, seq, status) VALUES (?, ?, ?, ?, ?, 'running')",
        (lease.run_id, lease.epoch, encode_json(asdict(owner)), now, lease.seq),
    )
    connection.execute(
        "INSERT INTO leases (run_id, epoch, until) VALUES (?, ?, ?)", (lease.run_id, lease.epoch, lease.until)
    )
    return lease


def _take(connection: sqlite3.Connection, run_id: str, now: float) -> None:
    """End the attempt of a running run as crashed, if it has lost its owner.

    Raises:
        RunLive: it has not.
    """
    row = _leased(connection, run_id)
    assert row is not None, "a running run has a lease"
    text, since, until = row
    owner = _owner(text)
    if held(owner, until, now):
        raise run_live(run_id, owner, since, until)
    finish(connection, run_id, "crashed", now)


def _leased(connection: sqlite3.Connection, run_id: str) -> tuple[str, float, float] | None:
    """Return the owner of the attempt that has a run, since when, and until when; None where nobody has it."""
    query = (
        "SELECT owner, started_at, until FROM leases JOIN attempts USING (run_id) WHERE run_id = ? AND number = epoch"
    )
    row: tuple[str, float, float] | None = connection.execute(query, (run_id,)).fetchone()
    return row


def _owner(text: str) -> Owner:
    return Owner(**json.loads(text))


def _status(connection: sqlite3.Connection, run_id: str) -> str:
    row = connection.execute("SELECT status FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    if row is None:
        raise RunNotFound(f"there is no run {run_id!r}")
    return str(row[0])
