"""Live resources: each generator runs from start to end in a task of its own, shielded, and is closed in bounded time.

Driven in the engine's own task under a timeout, a generator that opens a task group would break the nesting of cancel
scopes; in its own task it cannot. This file knows nothing of the tree. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.errors import CleanupError, StageFailed, StageTimeout

__all__ = ["LiveResource"]


class LiveResource:
    """One opened resource.

    Args:
        name: for messages.
        generator: the resource's generator, not started.
        on_death: called if it ends by itself before it was asked to close; ``error`` says why.
    """

    def __init__(self, name: str, generator: AsyncGenerator[Any, None], on_death: Callable[[], None]) -> None:
        self.name = name
        self.value: Any = None
        self.error: BaseException | None = None
        self._generator = generator
        self._on_death = on_death
        self._scope = anyio.CancelScope(shield=True)
        self._opened = anyio.Event()
        self._closing = anyio.Event()
        self._ended = anyio.Event()

    async def open(self, group: anyio.abc.TaskGroup, timeout: float | None, grace: float) -> Any:
        """Start the generator in the group and return what it yields.

        Raises:
            StageTimeout: it did not yield in time; it was cancelled.
            Exception: whatever it raised instead of yielding.
        """
        group.start_soon(self._serve)
        try:
            with anyio.move_on_after(timeout) as scope:
                await self._opened.wait()
        finally:
            if not self._opened.is_set():
                await self._cancel(grace)
        if scope.cancelled_caught:
            raise StageTimeout(f"did not open within {timeout:g} s", hint="raise its timeout: stage.with_(timeout=...)")
        if self.error is not None:
            raise self.error
        return self.value

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
            ended = await self._cancel(grace)
            how = "was cancelled" if ended else "ignores its cancellation"
            raise CleanupError(f"did not close within {grace:g} s and {how}", hint="see the config key grace")
        if self.error is not None:
            raise CleanupError(f"failed to close: {type(self.error).__name__}: {self.error}") from self.error

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
            self.error = error
        finally:
            died = self._opened.is_set() and not self._closing.is_set()
            self._ended.set()
            self._opened.set()
            if died:
                self._on_death()

    async def _live(self) -> None:
        generator = self._generator
        try:
            try:
                self.value = await anext(generator)
            except StopAsyncIteration:
                raise StageFailed("is a resource but did not yield", hint="yield the live thing once") from None
            self._opened.set()
            try:
                await self._closing.wait()
            except BaseException as error:  # noqa: BLE001 - a cancel scope of the generator's own, or ours
                await self._throw(error)
            else:
                await self._finish()
        finally:
            with anyio.CancelScope(shield=True):
                await generator.aclose()

    async def _finish(self) -> None:
        try:
            await anext(self._generator)
        except StopAsyncIteration:
            return
        raise StageFailed("is a resource but yielded twice", hint="yield the live thing once")

    async def _throw(self, error: BaseException) -> None:
        """Give the generator what cancelled it, so that its own scopes can tell whether it is theirs."""
        try:
            await self._generator.athrow(error)
        except StopAsyncIteration:
            raise StageFailed("ended before its block did") from None
        raise StageFailed("is a resource but yielded twice", hint="yield the live thing once")
