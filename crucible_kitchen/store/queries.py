"""What is asked of the SQLite store, as functions of the reader's connection, and rows as records.

They know no thread. Read next: ``crucible_kitchen.store.schema``.
"""

import json
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, select

from crucible_kitchen.events import EventRecord
from crucible_kitchen.store import schema
from crucible_kitchen.store.base import only_run
from crucible_kitchen.store.codec import decode_event
from crucible_kitchen.store.leases import orphaned
from crucible_kitchen.store.owner import Owner
from crucible_kitchen.store.records import Attempt, Checkpoint, RunRecord, RunStatus, StageRecord
from crucible_kitchen.types import BlobRef, Json, JsonObject

__all__ = ["artifacts", "attempts", "checkpoints", "events", "manifest", "orphans", "run", "runs", "stage_records"]


def events(connection: Connection, run_id: str, after: int, limit: int) -> list[EventRecord]:
    """Return a page of a run's log."""
    table = schema.events
    query = select(table).where(table.c.run_id == run_id, table.c.seq > after).order_by(table.c.seq).limit(limit)
    return [decode_event(*row) for row in connection.execute(query)]


def stage_records(connection: Connection, run_id: str) -> list[StageRecord]:
    """Return the stages' records of a run."""
    table = schema.stage_records
    query = select(table).where(table.c.run_id == run_id).order_by(table.c.seq)
    return [
        StageRecord(row.run_id, row.path, row.input_hash, row.output_hash, json.loads(row.value), row.seq)
        for row in connection.execute(query)
    ]


def run(connection: Connection, asked: str) -> RunRecord:
    """Return the run that an id or a prefix leads to."""
    table = schema.runs
    exact = select(table).where(table.c.run_id == asked)
    end = asked + "\U0010ffff"  # after everything that begins with the prefix
    prefix = select(table).where(table.c.run_id > asked, table.c.run_id < end).order_by(table.c.run_id).limit(4)
    rows = connection.execute(exact).all() or connection.execute(prefix).all()
    only_run(asked, [row.run_id for row in rows])
    return _run(rows[0])


def runs(
    connection: Connection,
    limit: int | None,
    status: RunStatus | None,
    workflow: str | None,
    since: float | None,
    before: float | None,
) -> list[RunRecord]:
    """Return the newest runs first."""
    table = schema.runs
    query = select(table).order_by(table.c.created_at.desc(), table.c.key.desc()).limit(limit)
    if status is not None:
        query = query.where(table.c.status == status)
    if workflow is not None:
        query = query.where(table.c.workflow == workflow)
    if since is not None:
        query = query.where(table.c.created_at >= since)
    if before is not None:
        query = query.where(table.c.created_at < before)
    return [_run(row) for row in connection.execute(query)]


def orphans(connection: Connection, now: float) -> list[str]:
    """Return the runs whose attempts have nobody who could go on."""
    lease, attempt = schema.leases, schema.attempts
    theirs = (attempt.c.run_id == lease.c.run_id) & (attempt.c.number == lease.c.epoch)
    query = select(lease.c.run_id, lease.c.until, attempt.c.owner).join(attempt, theirs).order_by(lease.c.run_id)
    rows = connection.execute(query)
    return [row.run_id for row in rows if orphaned(Owner(**json.loads(row.owner)), row.until, now)]


def attempts(connection: Connection, run_id: str) -> list[Attempt]:
    """Return a run's attempts, the first one first."""
    table = schema.attempts
    query = select(table).where(table.c.run_id == run_id).order_by(table.c.number)
    return [
        Attempt(
            run_id=row.run_id,
            number=row.number,
            owner=Owner(**json.loads(row.owner)),
            started_at=row.started_at,
            seq=row.seq,
            ended_at=row.ended_at,
            status=row.status,
            error=_json(row.error),
        )
        for row in connection.execute(query)
    ]


def checkpoints(connection: Connection, run_id: str, session: str | None) -> list[Checkpoint]:
    """Return the newest checkpoints first, each compared with its digest."""
    table = schema.checkpoints
    query = select(table).where(table.c.run_id == run_id).order_by(table.c.number.desc())
    if session is not None:
        query = query.where(table.c.session == session)
    return [_checkpoint(row) for row in connection.execute(query)]


def artifacts(connection: Connection, run_id: str) -> list[BlobRef]:
    """Return a run's artifacts in the order they were recorded."""
    table = schema.artifacts
    query = select(table).where(table.c.run_id == run_id).order_by(table.c.key)
    return [BlobRef(row.uri, row.sha256, row.size, row.kind, row.name) for row in connection.execute(query)]


def manifest(connection: Connection, run_id: str) -> JsonObject | None:
    """Return a run's manifest."""
    query = select(schema.manifests.c.data).where(schema.manifests.c.run_id == run_id)
    found: JsonObject | None = _json(connection.execute(query).scalar_one_or_none())
    return found


def _json(text: str | None) -> Json:
    return None if text is None else json.loads(text)


def _run(row: Row[Any]) -> RunRecord:
    return RunRecord(
        run_id=row.run_id,
        workflow=row.workflow,
        status=row.status,
        config=json.loads(row.config),
        config_hash=row.config_hash,
        created_at=row.created_at,
        finished_at=row.finished_at,
        result=_json(row.result),
        error=_json(row.error),
    )


def _checkpoint(row: Row[Any]) -> Checkpoint:
    try:
        data, states, damaged = json.loads(row.data), json.loads(row.states), False
    except ValueError:
        data, states, damaged = {}, {}, True
    found = Checkpoint(
        run_id=row.run_id,
        number=row.number,
        session=row.session,
        place=row.place,
        step=row.step,
        epoch=row.epoch,
        seq=row.seq,
        created_at=row.created_at,
        data=data,
        states=states,
        sha256=row.sha256,
        damaged=damaged,
    )
    return found if not damaged and found.digest() == row.sha256 else replace(found, damaged=True)
