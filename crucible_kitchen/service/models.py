"""One model in training behind the wire: puts requests into the order of their numbers and runs them on a session.

A model is one task. It owns the session and its open step, so that scopes are entered and left where they must be.
Knows the training port, no HTTP. Read next: ``crucible_kitchen.service.operations``.
"""

from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.errors import BackendUserError, CapacityError, SessionLost
from crucible_kitchen.ports import Sampler, TrainingSession, TrainingStepScope
from crucible_kitchen.service.futures import Future, Futures
from crucible_kitchen.types import JsonObject, SessionSpec

__all__ = ["Limits", "Operation", "SessionOpener", "TrainedModel"]

Answer = Awaitable[JsonObject | bytes]
Operation = Callable[["TrainedModel"], Awaitable[Answer]]
"""Submits a call to a model's session when its turn has come, and returns what its answer is awaited by."""
SessionOpener = Callable[[SessionSpec], AbstractAsyncContextManager[TrainingSession]]


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        open_calls: results that a model may owe before it refuses more.
        gap: seconds that a request waits for the one before it in its sequence.
        samplers: samplers of unsaved weights that a model keeps; the oldest goes first.
        session: seconds without a sign of its client after which a session is closed.
        body: largest request, bytes.
        hold: seconds that an answer is waited for before the client is told to ask again.
        opened: models opened for sampling only that are kept.
    """

    open_calls: int = 256
    gap: float = 60.0
    samplers: int = 8
    session: float = 900.0
    body: int = 1 << 26
    hold: float = 35.0
    opened: int = 4


@dataclass
class _Step:
    """The open accumulation and the block it lives in."""

    block: AbstractAsyncContextManager[TrainingStepScope]
    scope: TrainingStepScope
    place: tuple[int, int]


@dataclass
class TrainedModel:
    """A model in training.

    Attributes:
        id: the wire's name for it.
        open_session: opens a session of what trains.
        spec: what its session is opened on.
        futures: where results go.
        limits: what is allowed.
    """

    id: str
    open_session: SessionOpener
    spec: SessionSpec
    futures: Futures
    limits: Limits
    session: TrainingSession = field(init=False)
    samplers: "OrderedDict[str, Sampler]" = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._early: dict[int, tuple[Future, Operation]] = {}
        self._numbered: OrderedDict[int, Future] = OrderedDict()
        self._next = 1
        self._arrived = anyio.Event()
        self._step: _Step | None = None
        self._applied: Awaitable[Any] | None = None
        self._scope = anyio.CancelScope()
        self._opened = anyio.Event()
        self.failure: Exception | None = None
        self.closed = anyio.Event()

    def submit(self, number: int | None, operation: Operation) -> Future:
        """Take a request; one of a number that was taken before is the same request.

        Raises:
            SessionLost: the model is gone, or the number's result was let go of.
            CapacityError: too many results are owed.
            BackendUserError: the number cannot come any more.
        """
        if self.failure is not None or self._scope.cancel_called:
            raise SessionLost("the model is closed", hint="create it again and load its last weights")
        if number is None:
            number = max([self._next - 1, *self._early]) + 1
        if number in self._numbered:
            return self._numbered[number]
        if number < self._next:
            raise BackendUserError(f"request {number} of the model was answered long ago")
        if sum(not f.fetched for f in self._numbered.values()) >= self.limits.open_calls:
            raise CapacityError(f"{self.limits.open_calls} results of the model wait", hint="fetch them first")
        future = self.futures.create()
        self._numbered[number] = future
        self._early[number] = future, operation
        while len(self._numbered) > 4 * self.limits.open_calls:
            self._numbered.popitem(last=False)
        self._arrived.set()
        return future

    async def ready(self) -> TrainingSession:
        """Return the session, once it is open.

        Raises:
            SessionLost: the model is closed.
            CrucibleError: it could not be opened.
        """
        await self._opened.wait()
        if self.closed.is_set():
            raise self.failure or SessionLost("the model is closed", hint="create it again and load its last weights")
        return self.session

    def close(self) -> None:
        """End the model; what it owes is answered as lost."""
        self._scope.cancel()

    async def run(self, opened: Future) -> None:
        """Open the session, answer ``opened``, and serve until closed."""
        try:
            with self._scope:
                async with self.open_session(self.spec) as session:
                    self.session = session
                    self._opened.set()
                    opened.resolve({"model_id": self.id, "type": "create_model"})
                    async with self._closing_step(), anyio.create_task_group() as group:
                        await self._serve(group)
        except Exception as error:  # noqa: BLE001 - told to whoever waits; the server goes on
            self.failure = error
        finally:
            self.closed.set()
            self._opened.set()
            end = self.failure or SessionLost("the model was closed")
            opened.fail(end)
            for future in self._numbered.values():
                future.fail(SessionLost("the model was closed before this call ended"))
                self.futures.release(future)

    @asynccontextmanager
    async def _closing_step(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self._leave_step()
            self.samplers.clear()

    async def _serve(self, group: anyio.abc.TaskGroup) -> None:
        while True:
            while self._next in self._early:
                future, operation = self._early.pop(self._next)
                self._next += 1
                await self._begin(group, future, operation)
            self._arrived = anyio.Event()
            with anyio.move_on_after(self.limits.gap if self._early else None):
                await self._arrived.wait()
                continue
            self._give_up_gap()

    def _give_up_gap(self) -> None:
        """Fail what waits for a number that did not come; its sequence goes on with that number."""
        for number in list(self._early):
            future, _ = self._early.pop(number)
            self._numbered.pop(number, None)
            future.fail(
                SessionLost(
                    f"request {self._next} of the model did not come within {self.limits.gap:g} s, so that"
                    f" {number} cannot run",
                    hint=f"submit again from {self._next} on",
                )
            )

    async def _begin(self, group: anyio.abc.TaskGroup, future: Future, operation: Operation) -> None:
        """Submit one call; its answer is waited for beside the calls after it."""
        try:
            answer = await operation(self)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            future.fail(error)
            return
        group.start_soon(self._finish, future, answer)

    async def _finish(self, future: Future, answer: Answer) -> None:
        try:
            future.resolve(await answer)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            future.fail(error)

    async def step(self, index: int | None, attempt: int | None) -> TrainingStepScope:
        """Return the open accumulation; without an index the one that is open, or a new one.

        Another index or attempt than the open one's drops that and opens a new one.
        """
        if self._step is not None:
            if index is None or self._step.place == (index, attempt):
                return self._step.scope
            await self._leave_step()
        if self._applied is not None:
            await _ended(self._applied)
        position = self.session.position if index is None else index
        block = self.session.step(position)
        self._step = _Step(block, await block.__aenter__(), (position, attempt or 0))
        return self._step.scope

    async def applied(self, pending: Awaitable[Any]) -> None:
        """Close the accumulation that was applied."""
        self._applied = pending
        await self._leave_step()

    async def _leave_step(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            await step.block.__aexit__(None, None, None)

    async def drop_step(self) -> None:
        """Drop the open accumulation."""
        await self._leave_step()

    async def keep_sampler(self, key: str, sampler: Sampler) -> None:
        """Keep a sampler of weights that were not saved; the oldest beyond the limit is closed."""
        self.samplers[key] = sampler
        while len(self.samplers) > self.limits.samplers:
            _, oldest = self.samplers.popitem(last=False)
            await oldest.aclose()


async def _ended(pending: Awaitable[Any]) -> None:
    try:
        await pending
    except Exception:  # noqa: BLE001 - told to whoever awaits it
        return
