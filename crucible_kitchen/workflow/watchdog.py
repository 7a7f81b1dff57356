"""The watchdog: when nothing of a run moves any more, it says what everything waits for, and may end the run.

It looks four times in ``stall_after`` seconds whether the run's account of waits has changed, so a stall is told after
``stall_after`` and at most a quarter more. It knows no stage and no adapter. Read next: ``crucible_kitchen.waits``.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio
import anyio.abc

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import RunStalled
from crucible_kitchen.events import StallDetected
from crucible_kitchen.loop import EventLoop
from crucible_kitchen.types import JsonObject
from crucible_kitchen.waits import Waiting, Waits, culprit, current_waits
from crucible_kitchen.workflow.failures import note
from crucible_kitchen.workflow.run import RunContext

__all__ = ["watched"]

T = TypeVar("T")

_LOOKS = 4
_LISTED = 50
"""At most so many waits are told; the oldest come first."""


async def watched(work: Callable[[], Awaitable[T]], config: RunConfig, context: RunContext) -> T:
    """Do the work of a run, and watch it.

    Raises:
        RunStalled: nothing moved for ``stall_after`` seconds, and ``on_stall`` is ``abort``.
        Exception: whatever the work raised.
    """
    waits = context.waits = Waits(EventLoop())
    token = current_waits.set(waits)
    result: list[T] = []
    failure: Exception | None = None
    try:
        async with anyio.create_task_group() as group:
            dog = _Watchdog(waits, config, context, group.cancel_scope)
            if config.stall_after:
                group.start_soon(dog.watch)
            try:
                result.append(await work())
            except Exception as error:  # noqa: BLE001 - raised below, outside the group that would wrap it
                failure = error
            group.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class():
        if failure is None:  # what failed before the cancellation came is what is reported
            raise
    finally:
        current_waits.reset(token)
    if dog.verdict is not None:
        note(dog.verdict, [failure] if failure is not None else [])
        raise dog.verdict
    if failure is not None:
        raise failure
    return result[0]


class _Watchdog:
    """One run's watchdog; ``verdict`` is why it ended the run."""

    def __init__(self, waits: Waits, config: RunConfig, context: RunContext, scope: anyio.CancelScope) -> None:
        self.verdict: Exception | None = None
        self._waits = waits
        self._config = config
        self._context = context
        self._scope = scope

    async def watch(self) -> None:
        """Look, until the run is over."""
        after = self._config.stall_after
        moves, quiet = self._waits.moves, 0
        while self.verdict is None:
            await anyio.sleep(after / _LOOKS)
            if (now := self._waits.moves) != moves:
                moves, quiet = now, 0
                continue
            quiet += 1
            if quiet == _LOOKS:  # told once, until something moves again
                self._tell()
                moves = self._waits.moves

    def _tell(self) -> None:
        edges, now = self._waits.snapshot(), self._waits.now()
        blamed = _sentence(culprit(edges), now)
        try:
            self._context.emit(
                StallDetected(
                    stalled_s=self._config.stall_after,
                    culprit=blamed,
                    policy=self._config.on_stall,
                    waits=[_told(edge, now) for edge in edges[:_LISTED]],
                )
            )
        except Exception as broken:  # noqa: BLE001 - a run stops rather than go on without its log
            self._end(broken)
            return
        if self._config.on_stall == "abort":
            what = f"nothing moved for {self._config.stall_after:g} s: {blamed}"
            self._end(RunStalled(what, hint="the event run.stalled lists all waits; see the config key stall_after"))

    def _end(self, verdict: Exception) -> None:
        self.verdict = verdict
        self._scope.cancel()


def _sentence(blamed: Sequence[Waiting], now: float) -> str:
    """Return the culprit in one line: a circle as it goes round, else what is waited for and where that stands."""
    if not blamed:
        return "no stage is running"
    parts = [f"{edge.says()} since {now - edge.since:.0f} s" for edge in blamed]
    if len(blamed) > 1:
        return "a circle: " + ", ".join(parts)
    return parts[0] + (f", at {blamed[0].at}" if blamed[0].at else "")


def _told(edge: Waiting, now: float) -> JsonObject:
    return {"who": edge.who, "cause": edge.cause, "whom": edge.whom, "for_s": round(now - edge.since, 3), "at": edge.at}
