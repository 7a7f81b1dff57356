"""A sink for tests: it remembers, and fails or stalls where it is told to. Read next: ``telemetry.sinks``."""

from collections.abc import Sequence

import anyio
import anyio.lowlevel

from crucible_kitchen.events import Event, EventRecord
from crucible_kitchen.telemetry.sinks import RunInfo

__all__ = ["RecordingSink"]


class RecordingSink:
    """Keeps all it is given.

    Args:
        failures: how many calls of ``handle`` fail before one succeeds; -1 for all.
        stalled: wait before every batch until ``release`` is called.
    """

    name = "recording"

    def __init__(self, *, failures: int = 0, stalled: bool = False) -> None:
        self.runs: list[RunInfo] = []
        self.records: list[EventRecord] = []
        self.closed = False
        self._failures = failures
        self._released = anyio.Event()
        if not stalled:
            self._released.set()

    @property
    def events(self) -> list[Event]:
        """The events without their places."""
        return [record.event for record in self.records]

    @property
    def names(self) -> list[str]:
        """The events' names."""
        return [record.event.name for record in self.records]

    def release(self) -> None:
        """Let a stalled sink go on."""
        self._released.set()

    async def open(self, run: RunInfo) -> None:
        """Remember the run."""
        await anyio.lowlevel.checkpoint()
        self.runs.append(run)

    async def handle(self, records: Sequence[EventRecord]) -> None:
        """Remember the records, or fail."""
        await anyio.lowlevel.checkpoint()
        await self._released.wait()
        if self._failures:
            self._failures -= 1
            raise ConnectionError("the sink was told to fail")
        self.records.extend(records)

    async def aclose(self) -> None:
        """Remember that it was closed."""
        await anyio.lowlevel.checkpoint()
        self.closed = True
