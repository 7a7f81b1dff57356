"""The floor of a durable stage: handing something to another thread and hearing back, without and with a commit.

Nothing here is the project's own: the standard library's lock, event loop and SQLite driver, with the pragmas of the
run store. What a machine cannot do faster than this, no engine that keeps its commits off the loop can.
"""

import asyncio
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

__all__ = ["committed", "handed_over"]

_ROW = (1.0, "stage.stop", '{"stage":"s1","recipe":"bench","path":"bench/i[1]/s1","duration_s":0.0001}')


async def handed_over(count: int) -> float:
    """Return the seconds of one hand-off to a thread that does nothing, and back."""
    return await _there_and_back(lambda _: None, count)


async def committed(count: int) -> float:
    """Return the seconds of one hand-off to a thread that commits one row, and back."""
    with tempfile.TemporaryDirectory() as folder, closing(_connected(Path(folder) / "floor.db")) as connection:
        insert = "INSERT INTO events VALUES ('run', ?, ?, ?, ?)"
        return await _there_and_back(lambda seq: connection.execute(insert, (seq, *_ROW)), count)


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for pragma in ("page_size=2048", "journal_mode=WAL", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(
        "CREATE TABLE events (run_id TEXT, seq INTEGER, time REAL, name TEXT, data TEXT, PRIMARY KEY (run_id, seq)) "
        "WITHOUT ROWID"
    )
    return connection


async def _there_and_back(work: Callable[[int], object], count: int) -> float:
    loop, bell = asyncio.get_running_loop(), threading.Lock()
    answers = [loop.create_future() for _ in range(count)]
    bell.acquire()

    def serve() -> None:
        for seq, answer in enumerate(answers):
            bell.acquire()
            work(seq)
            loop.call_soon_threadsafe(answer.set_result, None)

    thread = threading.Thread(target=serve)
    thread.start()
    began = time.perf_counter()
    for answer in answers:
        bell.release()
        await answer
    taken = time.perf_counter() - began
    thread.join()
    return taken / count
