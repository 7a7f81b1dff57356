"""Lives over one store, each killed (SIGKILL) before its n-th SQL statement, for every n; checked after each death.

    python dying.py FILE

A life recovers what the one before left, writes one of everything and ends. It prints a line for each death and
``lived`` for the first life that reached its end.
"""

import os
import signal
import sqlite3
import sys
from collections.abc import Awaitable
from pathlib import Path

import anyio

from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import Checkpoint, RunRecord, SqliteRunStore, StageRecord
from crucible_kitchen.store import sqlite as module
from crucible_kitchen.types import BlobRef


def dies_at(n: int) -> None:
    """Make this process kill itself before the writer's n-th statement."""
    connect, count = module._connect, 0

    def counting(path: Path) -> sqlite3.Connection:
        connection = connect(path)

        def before(statement: str) -> None:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

        connection.set_trace_callback(before)
        return connection

    module._connect = counting


async def life(path: Path, said: int) -> None:
    """Recover, write one of everything, end; say what is promised."""

    async def promise(what: str, call: Awaitable[object]) -> None:
        await call
        os.write(said, f"{what}\n".encode())

    async with SqliteRunStore(path) as store:
        await store.reconcile()
        lease = await store.open_attempt("r")
        os.write(said, b"attempt\n")
        await promise("renewed", store.renew(lease))
        for seq in (lease.seq + 1, lease.seq + 2):
            store.append([EventRecord("r", seq, 0.0, WarningRaised(code="c", message="m"))])
            store.record(StageRecord("r", f"w/{seq}", "in", "out", seq, seq))
            await promise(f"event {seq}", store.flush("r", seq))
        number = lease.epoch
        made = Checkpoint("r", number, "w/s", "w/s", 0, lease.epoch, lease.seq, 0.0)
        await promise(f"checkpoint {number}", store.put_checkpoint(made))
        await promise("artifact", store.put_artifact("r", BlobRef("blob://x", "x", 1, "weights", "w")))
        await promise(f"end {number}", store.finish_run("r", "failed", {}))


async def check(path: Path, promised: list[str]) -> None:
    """Check that what is there is whole, and holds what was promised."""
    async with SqliteRunStore(path) as store:
        events = [record.seq for record in await store.read("r", 0, 10_000)]
        assert events == list(range(1, len(events) + 1)), events
        attempts = await store.attempts("r")
        assert [attempt.number for attempt in attempts] == list(range(1, len(attempts) + 1))
        assert all(attempt.ended_at is not None for attempt in attempts[:-1]), attempts
        run = await store.run("r")
        assert run.status == attempts[-1].status, (run, attempts)
        assert (run.finished_at is None) is (run.status == "running") is (attempts[-1].ended_at is None)
        assert len(attempts) >= 1 + promised.count("attempt")
        assert {f"event {seq}" for seq in events} >= {line for line in promised if line.startswith("event")}
        assert {r.value for r in await store.records("r")} >= {
            int(line.split()[1]) for line in promised if line.startswith("event")
        }
        saved = await store.checkpoints("r")
        assert not any(checkpoint.damaged for checkpoint in saved)
        assert {f"checkpoint {c.number}" for c in saved} >= {line for line in promised if line.startswith("checkp")}
        ends = {f"end {attempt.number}" for attempt in attempts if attempt.status == "failed"}
        assert ends >= {line for line in promised if line.startswith("end")}
        if "artifact" in promised:
            assert len(await store.artifacts("r")) == 1


async def begin(path: Path) -> None:
    """Make the run that the lives go on with."""
    async with SqliteRunStore(path) as store:
        await store.create_run(RunRecord("r", "w"))


def main(path: Path) -> None:
    anyio.run(begin, path)
    promised: list[str] = []
    for n in range(1, 1000):
        heard, said = os.pipe()
        child = os.fork()
        if not child:
            dies_at(n)
            anyio.run(life, path, said)
            os._exit(0)
        os.close(said)
        with os.fdopen(heard) as lines:
            promised += lines.read().splitlines()
        _, status = os.waitpid(child, 0)
        anyio.run(check, path, promised)
        if not os.WIFSIGNALED(status):
            print("lived" if status == 0 else f"failed: {status}", flush=True)
            return
        print(f"died at {n}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
