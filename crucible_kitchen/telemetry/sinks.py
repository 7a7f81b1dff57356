"""Where events go: the Sink protocol, and the pump that brings a run's log to a sink without ever stopping the run.

It knows no particular sink. Read next: ``crucible_kitchen.telemetry.console``, ``.jsonl``, ``.prometheus`` or
``.tensorboard``.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import anyio

from crucible_kitchen.errors import CrucibleError, StoreError
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.telemetry.bus import EventLog
from crucible_kitchen.types import JsonObject

__all__ = ["RunInfo", "Sink", "pump"]

_log = logging.getLogger(__name__)

ATTEMPTS = 5
BACKOFF = 0.1
BACKOFF_MOST = 2.0
BATCH = 256
"""Most records that a sink is given at a time."""
CALL_SECONDS = 10.0
LINGER = 0.02
"""Seconds between two batches, so that a sink is not woken by every single commit."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink is told of a run before its first event."""

    run_id: str
    workflow: str
    manifest: JsonObject = field(default_factory=dict)


@runtime_checkable
class Sink(Protocol):
    """Something that shows or keeps events. One sink may serve many runs at a time, told apart by ``run_id``.

    A call that raises is made again with the same records: a sink that cannot bear a record twice skips those whose
    ``seq`` it has seen. Calls of one run never overlap. Whoever made the sink closes it, once all its runs ended.
    """

    @property
    def name(self) -> str:
        """The sink's name, for warnings."""
        ...

    async def open(self, run: RunInfo) -> None:
        """Get ready for a run's events."""
        ...

    async def handle(self, records: Sequence[EventRecord]) -> None:
        """Take the next records of one run, in order."""
        ...

    async def aclose(self) -> None:
        """Write what is held back and release everything. Idempotent."""
        ...


class _GaveUp(Exception):
    """Raised inside this module when a sink failed too often."""


async def pump(sink: Sink, run: RunInfo, log: EventLog) -> None:
    """Bring a run's events to a sink, to the terminal one; run it in a task of its own.

    A sink that raises is tried again, with a wait that doubles up to 2 s; after five failures in a row, or a call that
    takes longer than 10 s, it gets nothing more of this run, and the run's log says so. Neither this nor a broken
    journal raises.
    """
    try:
        await _tried(sink, lambda: sink.open(run))
        async for batch in log.batches(size=BATCH):
            await _tried(sink, lambda records=batch: sink.handle(records))  # type: ignore[misc]
            if len(batch) < BATCH and not batch[-1].terminal:  # else there is more, and the sink is to keep up
                await anyio.sleep(LINGER)
    except _GaveUp as error:
        _warn(sink, log, str(error))
    except StoreError:  # the run itself learns it from the journal
        return


async def _tried(sink: Sink, call: Callable[[], Awaitable[None]]) -> None:
    wait = BACKOFF
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with anyio.move_on_after(CALL_SECONDS) as scope:
                await call()
            if not scope.cancelled_caught:
                return
        except Exception as error:
            # A foreign error's text may hold what is secret: its kind is enough for the log, the rest is for logging.
            _log.debug("sink %s failed", sink.name, exc_info=True)
            if attempt == ATTEMPTS:
                told = str(error) if isinstance(error, CrucibleError) else type(error).__name__
                raise _GaveUp(f"it failed {ATTEMPTS} times: {told}") from error
        else:
            raise _GaveUp(f"it took longer than {CALL_SECONDS:g} s")
        await anyio.sleep(wait)
        wait = min(2 * wait, BACKOFF_MOST)


def _warn(sink: Sink, log: EventLog, why: str) -> None:
    message = f"the sink {sink.name!r} gets no more events of this run: {why}"
    _log.warning(message)
    if not log.ended:
        try:
            log.emit(WarningRaised(code="telemetry.sink_disabled", message=message))
        except StoreError:  # nothing can be told through a broken journal
            return
