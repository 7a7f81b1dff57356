"""Both stores, each on every loop it runs on, as two processes would have them: two stores over the same runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.store import MemoryRunStore, RunStore, SqliteRunStore
from crucible_kitchen.testing.stores import FaultyStore


class Clock:
    """The time of day, as a test says."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(99.5)


@pytest.fixture
def kind() -> str:
    return "sqlite-asyncio"


@pytest.fixture
def anyio_backend(kind: str) -> Any:
    if kind.endswith("virtual-time"):
        from trio.testing import MockClock

        return "trio", {"clock": MockClock(autojump_threshold=0)}
    return kind.rpartition("-")[2]


@pytest.fixture
def make(kind: str, tmp_path: Path, clock: Clock) -> Callable[[], RunStore]:
    """Makes stores over the same runs, which share nothing else."""
    if kind.startswith("sqlite"):
        return lambda: SqliteRunStore(tmp_path / "deep" / "er" / "runs.db", clock=clock)
    first = MemoryRunStore(clock=clock)
    if kind.startswith("faultless"):
        return lambda: FaultyStore(MemoryRunStore(clock=clock, beside=first))
    return lambda: MemoryRunStore(clock=clock, beside=first)
