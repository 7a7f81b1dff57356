"""What actors need of the event loop, looked up once: its clock, its events, and a signal that costs less.

anyio finds its backend anew at every call, and an ``anyio.Event`` serves many waiters; both cost more than all the rest
of an ask. This file knows nothing of actors. Read next: ``crucible_kitchen.actors.ref``.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, TypeAlias

import anyio

__all__ = ["Loop", "Signal"]

Signal: TypeAlias = Awaitable[object]
"""Awaited by one task, once; goes on when it is given to ``Loop.set``."""


class Loop:
    """The running event loop.

    Attributes:
        time: says what ``anyio.current_time`` says, virtual time included.
        event: the backend's own class of ``anyio.Event``.
        signal: makes a signal.
        set: lets the task that awaits a signal go on; once set, or once nobody waits any more, it does nothing.
    """

    def __init__(self) -> None:
        self.event: type[anyio.Event] = type(anyio.Event())
        self.time: Callable[[], float]
        self.signal: Callable[[], Signal]
        self.set: Callable[[Any], None]
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no asyncio loop runs in this thread: it is trio's
            import trio

            self.time, self.signal, self.set = trio.current_time, _TrioSignal, _TrioSignal.set
        else:
            plain = getattr(type(loop), "time", None) is asyncio.BaseEventLoop.time
            self.time = time.monotonic if plain else loop.time  # the same, without a call in between
            self.signal, self.set = partial(asyncio.Future, loop=loop), _set_future


def _set_future(future: asyncio.Future[None]) -> None:
    try:  # cheaper than to ask first, which counts here
        future.set_result(None)
    except asyncio.InvalidStateError:  # a waiter that was cancelled has cancelled it
        return


class _TrioSignal:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def __await__(self) -> Generator[Any, Any, object]:
        return self._event.wait().__await__()

    def set(self) -> None:
        self._event.set()
