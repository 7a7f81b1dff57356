"""What is needed of the event loop, looked up once: its clock, its task, its scopes and events, and a cheap signal.

anyio finds its backend anew at every call, and an ``anyio.Event`` serves many waiters; for a stage or an ask both cost
more than what is asked of them. This file knows nothing of workflows, actors and stores. Read next:
``crucible_kitchen.waits``.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel

__all__ = ["EventLoop", "Signal"]

Signal: TypeAlias = Awaitable[object]
"""Awaited by one task, once; goes on when it is given to ``EventLoop.set``."""


class EventLoop:
    """The running event loop.

    Attributes:
        time: says what ``anyio.current_time`` says, virtual time included.
        task: says which task runs.
        scope: the backend's own class of ``anyio.CancelScope``.
        event: the backend's own class of ``anyio.Event``.
        checkpoint_if_cancelled: anyio's.
        signal: makes a signal.
        set: lets the task that awaits a signal go on; once set, or once nobody waits any more, it does nothing.
    """

    def __init__(self) -> None:
        self.scope: type[anyio.CancelScope] = type(anyio.CancelScope())
        self.event: type[anyio.Event] = type(anyio.Event())
        self.checkpoint_if_cancelled: Callable[[], Awaitable[None]] = (
            anyio.lowlevel.current_token().backend_class.checkpoint_if_cancelled
        )
        self.time: Callable[[], float]
        self.task: Callable[[], Any]
        self.signal: Callable[[], Signal]
        self.set: Callable[[Any], None]
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no asyncio loop runs in this thread: it is trio's
            import trio

            self.time, self.task = trio.current_time, trio.lowlevel.current_task
            self.signal, self.set = _TrioSignal, _TrioSignal.set
        else:
            plain = getattr(type(loop), "time", None) is asyncio.BaseEventLoop.time
            self.time = time.monotonic if plain else loop.time  # the same, without a call in between
            self.task = partial(asyncio.current_task, loop)
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
