"""A sink that appends every event as one line of JSON to a file. Read next: ``crucible_kitchen.telemetry.sinks``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from crucible_kitchen.errors import StorageFull, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.telemetry.sinks import RunInfo
from crucible_kitchen.workers import Lane

__all__ = ["JsonlSink"]


class JsonlSink:
    """Appends events to a JSON Lines file, one object per event as ``EventRecord.to_json`` gives it.

    The file is opened once and flushed after every batch; NaN and infinity, which JSON has no word for, become null.

    Args:
        path: the file; its directory is created.
    """

    name = "jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lane = Lane("crucible-jsonl")
        self._file: TextIO | None = None
        self._closed = False
        self._seen: dict[str, int] = {}

    async def open(self, run: RunInfo) -> None:
        """Open the file if no run did before."""
        self._seen.setdefault(run.run_id, 0)
        await self._lane.run(self._open)

    async def handle(self, records: Sequence[EventRecord]) -> None:
        """Append and flush; records that an earlier try already wrote are left out."""
        run_id = records[0].run_id
        fresh = [record for record in records if record.seq > self._seen.get(run_id, 0)]
        if fresh:
            await self._lane.run(self._write, fresh)
        if records[-1].terminal:
            self._seen.pop(run_id, None)

    async def aclose(self) -> None:
        """Close the file."""
        if not self._closed:
            self._closed = True
            await self._lane.run(self._close)
            await self._lane.aclose()

    def _open(self) -> None:
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            except OSError as error:
                raise StoreError(f"cannot open the events file: {error.strerror}") from error

    def _write(self, records: Sequence[EventRecord]) -> None:
        assert self._file is not None
        text = "".join(json_line(record) + "\n" for record in records)
        before = self._file.tell()
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self._undo(before)
            raise StorageFull(f"cannot write the events file: {error.strerror}", hint="free space") from error
        self._seen[records[0].run_id] = records[-1].seq

    def _undo(self, size: int) -> None:
        """Cut half a batch off again, so that the next try begins on a line of its own."""
        self._close()
        with self._path.open("r+b") as file:
            file.truncate(size)
        self._open()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # what could not be flushed was reported when it was written
                return


def json_line(record: EventRecord) -> str:
    """Return a record as strict JSON in one line."""
    value = record.to_json()
    try:
        return json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(value), default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
