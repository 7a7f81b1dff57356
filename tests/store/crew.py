"""A process over a run store that does what it is told, line by line, and answers each line with one.

    python crew.py FILE [TTL]

It is started by the tests with real processes; it has no clock and no chance of its own.
"""

import sys
from pathlib import Path

import anyio
import anyio.to_thread

from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import Checkpoint, Lease, RunRecord, SqliteRunStore, StageRecord
from crucible_kitchen.types import BlobRef


class Hand:
    """Does one thing at a time with its store."""

    def __init__(self, store: SqliteRunStore) -> None:
        self.store = store
        self.lease = Lease("none", 0, 0.0, 0)
        self.seq = 0

    async def create(self, run_id: str, ttl: str = "30") -> str:
        self.lease = await self.store.create_run(RunRecord(run_id, "w"), ttl=float(ttl))
        self.seq = 0
        return "1"

    async def open(self, run_id: str, ttl: str = "30") -> str:
        self.lease = await self.store.open_attempt(run_id, ttl=float(ttl))
        self.seq = self.lease.seq
        return str(self.lease.epoch)

    async def append(self, count: str = "1") -> str:
        """Append so many events, each flushed."""
        for _ in range(int(count)):
            self.seq += 1
            event = WarningRaised(code="c", message=f"attempt {self.lease.epoch}")
            self.store.append([EventRecord(self.lease.run_id, self.seq, 0.0, event)])
            await self.store.flush(self.lease.run_id, self.seq)
        return str(self.seq)

    async def record(self) -> str:
        self.store.record(StageRecord(self.lease.run_id, "w/stale", "in", "out", self.lease.epoch, self.seq))
        await self.store.flush(self.lease.run_id, self.seq)
        return "recorded"

    async def checkpoint(self, number: str) -> str:
        made = Checkpoint(self.lease.run_id, int(number), "w/s", "w/s", 0, self.lease.epoch, self.seq, 0.0)
        await self.store.put_checkpoint(made)
        return number

    async def artifact(self) -> str:
        await self.store.put_artifact(self.lease.run_id, BlobRef("blob://x", "x", 1, "weights", "stale"))
        return "kept"

    async def renew(self) -> str:
        self.lease = await self.store.renew(self.lease)
        return str(self.lease.until)

    async def finish(self, status: str) -> str:
        await self.store.finish_run(self.lease.run_id, status, {})  # type: ignore[arg-type]
        return status

    async def reconcile(self) -> str:
        return " ".join(run.run_id for run in await self.store.reconcile()) or "none"

    async def on(self) -> str:
        """Write without end: an event, a stage's record, now and then a checkpoint; say what is durable."""
        while True:
            seq = int(await self.append())
            self.store.record(StageRecord(self.lease.run_id, f"w/{seq}", "in", "out", seq, seq))
            await self.store.flush(self.lease.run_id, seq)
            if seq % 10 == 0:
                await self.checkpoint(str(seq // 10))
            print(seq, flush=True)


async def main(path: Path) -> None:
    async with SqliteRunStore(path) as store:
        hand = Hand(store)
        print("ready", flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            name, *arguments = line.split()
            try:
                answer = await getattr(hand, name)(*arguments)
            except CrucibleError as error:
                answer = error.code
            print(answer, flush=True)


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]))
