"""An asyncio event loop whose clock jumps to the next deadline as soon as all tasks wait: simulation at full speed.

Single-threaded: threads, sockets and subprocesses have no place in it. It knows no task. Read next:
``crucible_kitchen.rl.rehearsal``.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from crucible_kitchen.errors import TrainingError

__all__ = ["run_virtually"]

R = TypeVar("R")


class _Selector(selectors.SelectSelector):
    """Instead of waiting it lets the time pass."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Advance the clock by the time that would have been waited."""
        if timeout is None:
            raise TrainingError("everything waits for something that will never come")
        self.now += max(0.0, timeout)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return the simulated time in seconds."""
        return self._virtual.now


def run_virtually(main: Callable[[], Awaitable[R]]) -> R:
    """Run a coroutine function to its end in simulated time.

    Raises:
        TrainingError: all tasks wait, and no deadline is left that could wake one.
    """
    return anyio.run(main, backend="asyncio", backend_options={"loop_factory": _Loop})
