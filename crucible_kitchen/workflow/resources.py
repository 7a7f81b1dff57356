"""Live resources: each generator runs from start to end in a task of its own, shielded, and is closed in bounded time.

Driven in the engine's own task under a timeout, a generator that opens a task group would break the nesting of cancel
scopes; in its own task it cannot. This file knows nothing of the tree. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.errors import CleanupError, StageFailed, StageTimeout
from crucible_kitchen.waits import waiting
from crucible_kitchen.workflow.failures import cause_of, first_of, says

__all__ = ["LiveResource"]


class LiveResource:
    """One opened resource.

    Closing is bounded: ``grace`` seconds to close, then a cancellation, then ``grace`` seconds to end. A generator that
    shields itself from that too is reported; its task is still waited for when the run ends, because nothing but the
    end of the process can stop it.

    Args:
        generator: the resource's generator, not started.
        on_death: called with the reason if it ends by itself before it was asked to close; must not raise.
    """

    def __init__(self, generator: AsyncGenerator[Any, None], on_death: Callable[[Exception], None]) -> None:
        self._value: Any = None
        self._error: Exception | None = None
        self._generator = generator
        self._on_death = on_death
        self._scope = anyio.CancelScope(shield=True)
        self._yielded = False
        self._handed_out = False
        self._opened = anyio.Event()
        self._closing = anyio.Event()
        self._ended = anyio.Event()

    @property
    def alive(self) -> bool:
        """Whether it has yielded and not yet ended."""
        return self._yielded and not self._ended.is_set()

    async def open(self, group: anyio.abc.TaskGroup, timeout: float | None, grace: float) -> Any:
        """Start the generator in the group and return what it yields.

        If this raises and the resource is ``alive`` (it yielded as the caller was cancelled), it has to be closed.

        Raises:
            StageTimeout: it did not yield in time; it was cancelled.
            Exception: whatever it raised instead of yielding.
        """
        group.start_soon(self._serve)
        try:
            with anyio.move_on_after(timeout):
                await self._opened.wait()
            in_time = self._opened.is_set()
        finally:
            if not self._opened.is_set():
                self._closing.set()  # how it ends now is no death
                await self._cancel(grace)
        if not in_time:
            raise StageTimeout(
                f"did not open within {timeout:g} s", hint="raise its timeout: stage.with_(timeout=...)"
            ) from self._error
        if self._error is not None:
            raise self._error
        self._handed_out = True
        return self._value

    async def close(self, grace: float) -> None:
        """Ask it to close, wait ``grace`` seconds, then cancel it. Call it shielded.

        Raises:
            CleanupError: it failed, or had to be cancelled.
        """
        if self._ended.is_set():
            return
        self._closing.set()
        with anyio.move_on_after(grace):
            await self._ended.wait()
        if not self._ended.is_set():
            how = "was cancelled" if await self._cancel(grace) else "ignores its cancellation"
            raise CleanupError(f"did not close within {grace:g} s and {how}", hint="see the config key grace") from (
                self._error
            )
        if self._error is not None:
            raise CleanupError(f"failed to close: {says(first_of(self._error))}") from cause_of(self._error)

    async def _cancel(self, grace: float) -> bool:
        self._scope.cancel()
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + grace):
            await self._ended.wait()
        return self._ended.is_set()

    async def _serve(self) -> None:
        try:
            with self._scope:
                await self._live()
        except Exception as error:  # noqa: BLE001 - carried to whoever opens or closes
            self._error = error
        finally:
            self._ended.set()
            self._opened.set()
        if self._handed_out and self._error is not None and not self._closing.is_set():
            self._on_death(self._error)

    async def _live(self) -> None:
        try:
            if self._closing.is_set():  # given up before it began
                return
            try:
                with waiting("open"):
                    self._value = await anext(self._generator)
            except StopAsyncIteration:
                raise StageFailed("is a resource but did not yield", hint="yield the live thing once") from None
            self._yielded = True
            self._opened.set()
            try:
                await self._closing.wait()
            except BaseException as error:  # noqa: BLE001 - a cancel scope of the generator's own, or ours
                await self._throw(error)
            else:
                await self._finish()
        finally:
            await self._generator.aclose()

    async def _finish(self) -> None:
        try:
            with waiting("close"):
                await anext(self._generator)
        except StopAsyncIteration:
            return
        raise StageFailed("is a resource but yielded twice", hint="yield the live thing once")

    async def _throw(self, error: BaseException) -> None:
        """Give the generator what cancelled it, so that its own scopes can tell whether it is theirs."""
        try:
            await self._generator.athrow(error)
        except StopAsyncIteration:
            if self._closing.is_set():
                return
            raise StageFailed("ended before its block did", hint="what follows yield runs when it closes") from None
        raise StageFailed("is a resource but yielded twice", hint="yield the live thing once")
