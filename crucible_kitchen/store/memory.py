"""The run store's twin in memory: same Protocol, same contract suite, no file and no thread.

For tests on virtual time and for runs that need no history. It knows no database. Read next: ``tests/store``.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

import anyio.lowlevel

from crucible_kitchen.errors import Conflict, RunNotFound, StoreError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.store.base import FinalStatus, RunRecord, RunStatus, only_run
from crucible_kitchen.store.codec import decode_event, encode_json, through_json
from crucible_kitchen.store.front import JournalFront
from crucible_kitchen.types import BlobRef, JsonObject

__all__ = ["MemoryRunStore"]


class MemoryRunStore(JournalFront):
    """A run store in memory; a record is durable as soon as it is appended.

    Reading gives back what SQLite would: values that went through JSON.

    Args:
        clock: seconds since the epoch, for ``finished_at``.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(limit=0)
        self._clock = clock
        self._runs: dict[str, RunRecord] = {}
        self._logs: dict[str, list[EventRecord]] = {}
        self._artifacts: dict[str, dict[BlobRef, None]] = {}
        self._manifests: dict[str, JsonObject] = {}
        self._fresh: dict[str, int] = {}
        self._count = 0

    def _enqueue(self, record: EventRecord) -> None:
        self._logs[record.run_id].append(record)
        self._fresh[record.run_id] = record.seq
        self._count += 1

    def _notice(self) -> None:
        fresh, count = self._fresh, self._count
        self._fresh, self._count = {}, 0
        self._committed(fresh, count)

    def _hurry(self) -> None:
        """Do nothing: what was appended is durable."""

    async def open(self) -> None:
        """See ``RunStore.open``."""
        await anyio.lowlevel.checkpoint()
        self._ready()

    async def aclose(self) -> None:
        """See ``RunStore.aclose``."""
        self._fail(StoreError("the run store is closed"))
        await anyio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def create_run(self, record: RunRecord) -> None:
        """See ``RunStore.create_run``."""
        await self._writable()
        if record.run_id in self._runs:
            raise Conflict(f"the run {record.run_id!r} exists already")
        self._runs[record.run_id] = replace(record, config=through_json(record.config))
        self._logs[record.run_id] = []
        self._artifacts[record.run_id] = {}
        self._opened(record.run_id)

    async def finish_run(
        self, run_id: str, status: FinalStatus, result: JsonObject, error: JsonObject | None = None
    ) -> None:
        """See ``RunStore.finish_run``."""
        await self._writable(run_id)
        run = self._runs[run_id]
        if run.status != "running":
            raise Conflict(f"the run {run_id!r} has already ended: {run.status}")
        self._runs[run_id] = replace(
            run,
            status=status,
            result=through_json(result),
            error=error and through_json(error),
            finished_at=self._clock(),
        )

    async def read(self, run_id: str, after: int, limit: int) -> list[EventRecord]:
        """See ``RunStore.read``."""
        await self._readable()
        records = self._logs.get(run_id, [])[after : after + limit]
        return [decode_event(r.run_id, r.seq, r.time, r.event.name, encode_json(r.event)) for r in records]

    async def run(self, run_id: str) -> RunRecord:
        """See ``RunStore.run``."""
        await self._readable()
        found = [run_id] if run_id in self._runs else [known for known in self._runs if known.startswith(run_id)]
        return self._runs[only_run(run_id, found)]

    async def runs(
        self, limit: int = 50, status: RunStatus | None = None, workflow: str | None = None
    ) -> list[RunRecord]:
        """See ``RunStore.runs``."""
        await self._readable()
        wanted = [r for r in self._runs.values() if status in (None, r.status) and workflow in (None, r.workflow)]
        return sorted(wanted, key=lambda run: run.created_at)[::-1][:limit]  # stable: the newest of one moment first

    async def put_artifact(self, run_id: str, artifact: BlobRef) -> None:
        """See ``RunStore.put_artifact``."""
        await self._writable(run_id)
        self._artifacts[run_id].setdefault(artifact)

    async def artifacts(self, run_id: str) -> list[BlobRef]:
        """See ``RunStore.artifacts``."""
        await self._readable()
        return list(self._artifacts.get(run_id, ()))

    async def put_manifest(self, run_id: str, manifest: JsonObject) -> None:
        """See ``RunStore.put_manifest``."""
        await self._writable(run_id)
        self._manifests[run_id] = through_json(manifest)

    async def manifest(self, run_id: str) -> JsonObject | None:
        """See ``RunStore.manifest``."""
        await self._readable()
        manifest = self._manifests.get(run_id)
        return None if manifest is None else through_json(manifest)

    async def _writable(self, run_id: str | None = None) -> None:
        await anyio.lowlevel.checkpoint()
        self._check()
        if run_id is not None and run_id not in self._runs:
            raise RunNotFound(f"there is no run {run_id!r}")

    async def _readable(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._check()
