"""Threads: work that blocks for a while and always ends.

``run_sync`` is for anything that blocks shortly (files, hashing, user code); ``Lane`` is one thread that does its work
strictly in order (torch, SQLite). Under :func:`inline` (virtual-clock tests) both call the function at once.
``Submissions`` turns coroutines into ``Pending`` results inside a task group. Read next: ``processes.py``.
"""

import asyncio
import math
import queue
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from crucible_kitchen.errors import SessionLost
from crucible_kitchen.waits import waiting

__all__ = ["Lane", "PendingResult", "Submissions", "inline", "is_inline", "run_sync", "waker"]

P = ParamSpec("P")
R = TypeVar("R")

_inline: ContextVar[bool] = ContextVar("crucible_workers_inline", default=False)


@contextmanager
def inline() -> Iterator[None]:
    """Run all worker calls of this context inline: time is virtual and threads would not know it."""
    token = _inline.set(True)
    try:
        yield
    finally:
        _inline.reset(token)


def is_inline() -> bool:
    """Return whether worker calls of this context run inline."""
    return _inline.get()


async def run_sync(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a blocking function in a worker thread and return its result.

    Cancelling waits until the function has returned, so that no thread runs a run's code after the run.
    """
    if _inline.get():
        await anyio.lowlevel.checkpoint()
        return fn(*args, **kwargs)
    with waiting("thread", _called(fn)):
        return await anyio.to_thread.run_sync(lambda: fn(*args, **kwargs))


def _called(fn: Callable[..., Any]) -> str:
    """Return the name of what is called; of a function made inside another, that one's."""
    return getattr(fn, "__qualname__", type(fn).__name__).partition(".<locals>")[0]


class _Call:
    """One function on its way through a lane, and the loop that waits for it."""

    __slots__ = ("abandoned", "done", "error", "fn", "result", "wake")

    def __init__(self, fn: Callable[[], Any]) -> None:
        self.fn = fn
        self.done = anyio.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.abandoned = False
        self.wake = waker()

    def run(self) -> None:
        """Call the function in the lane's thread and wake whoever waits."""
        if not self.abandoned:
            try:
                self.result = self.fn()
            except BaseException as error:  # noqa: BLE001 - carried to the waiting task
                self.error = error
        try:
            self.wake(self.done.set)
        except RuntimeError:  # the loop is gone: nobody waits any more
            return


def waker() -> Callable[[Callable[[], object]], object]:
    """Return a function that runs a callback on the current event loop from another thread.

    The function it returns raises ``RuntimeError`` once the loop is gone.
    """
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:  # no asyncio loop runs in this thread: it is trio's
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon


class Lane:
    """One thread that runs the functions given to it strictly one after the other.

    Cancelling a call that has not begun removes it; cancelling a running one stops waiting at once and leaves the
    function to end by itself. ``aclose`` waits until the thread has ended.

    Args:
        name: the thread's name.

    Example::

        async with Lane("torch") as lane:
            loss = await lane.run(model.step, batch)
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def run(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``fn`` in the lane's thread and return its result."""
        if self._closed:
            raise RuntimeError(f"the lane {self._name!r} is closed")
        if _inline.get():
            await anyio.lowlevel.checkpoint()
            return fn(*args, **kwargs)
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        call = _Call(lambda: fn(*args, **kwargs))
        self._calls.put(call)
        try:
            with waiting("thread", f"{self._name}: {_called(fn)}"):
                await call.done.wait()
        except BaseException:
            call.abandoned = True
            raise
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[no-any-return]

    @property
    def wanted(self) -> bool:
        """Whether another call waits for the thread; may be asked in the thread itself."""
        return not self._calls.empty()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()

    async def aclose(self) -> None:
        """End the thread once what it is doing has returned. Idempotent."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(None)
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(thread.join)

    async def __aenter__(self) -> "Lane":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class PendingResult(Generic[R]):
    """The ``Pending`` of a call submitted to :class:`Submissions`."""

    __slots__ = ("_done", "_error", "_observed", "_value")

    def __init__(self) -> None:
        self._done = anyio.Event()
        self._value: R | None = None
        self._error: Exception | None = SessionLost("the call was cancelled with its session")
        self._observed = False

    def __await__(self) -> Generator[Any, Any, R]:
        return self._wait().__await__()

    @property
    def done(self) -> bool:
        """Whether the call has ended, well or not."""
        return self._done.is_set()

    def excuse(self) -> None:
        """Let nobody fail for this call: what asked for it is over."""
        self._observed = True

    async def _wait(self) -> R:
        await self._done.wait()
        self._observed = True
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Submissions:
    """The open calls of one session: submitted now, begun one after the other, awaited later.

    A failure that nobody awaited is raised by the next ``submit`` or ``check``; leaving the block cancels what is
    still open. An error of the block leaves it as it is, not in a group of one.

    Example::

        async with Submissions() as calls:
            pending = calls.submit(partial(backend.forward_backward, datums))
            step = await pending
    """

    def __init__(self) -> None:
        self._group = anyio.create_task_group()
        self._open = 0
        self._turn: anyio.Event | None = None
        self._failed: list[PendingResult[Any]] = []

    async def __aenter__(self) -> "Submissions":
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        # Where all around is cancelled the calls have heard of it. The group is not told what the block raised: it
        # would cancel them once more and write down by whom, which costs more than the rest of the way out.
        if self._open and anyio.current_effective_deadline() != -math.inf:
            self._group.cancel_scope.cancel()
        await self._group.__aexit__(None, None, None)

    def check(self) -> None:
        """Raise the first failure that nobody has awaited."""
        failed, self._failed = [p for p in self._failed if not p._observed], []
        for pending in failed:
            pending._observed = True
            assert pending._error is not None
            raise pending._error

    def submit(self, call: Callable[[], Awaitable[R]]) -> PendingResult[R]:
        """Start a call, once all submitted before it have ended, and return its pending result at once."""

        async def whole() -> Awaitable[R]:
            return _given(await call())

        whole.__qualname__ = _called(call)
        return self.send(whole)

    def send(self, call: Callable[[], Awaitable[Awaitable[R]]]) -> PendingResult[R]:
        """Start a call whose backend answers later, once all before it were accepted; return its pending result.

        The call returns when the backend has accepted it, with what its answer is awaited by.
        """
        self.check()
        pending: PendingResult[R] = PendingResult()
        before, self._turn = self._turn, anyio.Event()
        self._open += 1
        self._group.start_soon(self._run, call, pending, before, self._turn)
        return pending

    async def _run(
        self,
        call: Callable[[], Awaitable[Awaitable[R]]],
        pending: PendingResult[R],
        before: anyio.Event | None,
        turn: anyio.Event,
    ) -> None:
        try:
            if before is not None:
                await before.wait()
            with waiting("call", _called(call)):
                answer = await call()
                turn.set()
                pending._value = await answer
            pending._error = None
        except Exception as error:  # noqa: BLE001 - carried to whoever awaits
            pending._error = error
            self._failed.append(pending)
        finally:
            self._open -= 1
            pending._done.set()
            turn.set()


async def _given(value: R) -> R:
    return value
