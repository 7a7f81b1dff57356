"""Faults on purpose: any adapter, with chosen calls that fail, wait, hang or answer wrongly.

::

    client = with_faults(NoopTrainingClient(), fails("forward_backward", TransientBackendError("lost"), call=3))

It knows no port: calls are counted by the method's name, on the adapter and on all that it gives out (sessions, steps,
samplers, datasets). Read next: ``crucible_kitchen.testing.contracts``.
"""

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, cast

import anyio

__all__ = ["Fault", "corrupts", "delays", "fails", "hangs", "with_faults"]

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. Made by :func:`fails`, :func:`delays`, :func:`hangs`, :func:`corrupts`.

    Attributes:
        method: name of the method that it strikes.
        call: the first call that it strikes, counted from 1 over everything the adapter gave out.
        times: how many calls in a row; 0: all from there on.
        late: strike after the work was done, so that only the answer is lost; for pending results: when awaited.
        error: raised.
        delay: seconds to wait; infinite: until cancelled.
        change: what to make of the answer.
    """

    method: str
    call: int = 1
    times: int = 1
    late: bool = False
    error: Exception | None = None
    delay: float = 0.0
    change: Callable[[Any], Any] | None = None

    def strikes(self, method: str, number: int) -> bool:
        """Return whether it strikes this call of this method."""
        return method == self.method and number >= self.call and (not self.times or number < self.call + self.times)


def fails(method: str, error: Exception, *, call: int = 1, times: int = 1, late: bool = False) -> Fault:
    """Raise an error: before the work, or (``late``) after it, as when only the answer is lost."""
    return Fault(method, call, times, late, error=error)


def delays(method: str, seconds: float, *, call: int = 1, times: int = 1, late: bool = False) -> Fault:
    """Wait for some seconds."""
    return Fault(method, call, times, late, delay=seconds)


def hangs(method: str, *, call: int = 1, times: int = 1, late: bool = False) -> Fault:
    """Wait until cancelled."""
    return Fault(method, call, times, late, delay=float("inf"))


def corrupts(method: str, change: Callable[[Any], Any], *, call: int = 1, times: int = 1) -> Fault:
    """Answer with ``change(answer)``; for pending results the answer is what awaiting gives."""
    return Fault(method, call, times, change=change)


def with_faults(adapter: T, *faults: Fault) -> T:
    """Return the adapter with faults; whatever they do not strike is the adapter's own."""
    return cast(T, _proxy(adapter, _Plan(faults)))


class _Plan:
    """The faults of one adapter and how often each method was called."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self._faults = faults
        self._calls: Counter[str] = Counter()

    def called(self, method: str) -> list[Fault]:
        self._calls[method] += 1
        return [fault for fault in self._faults if fault.strikes(method, self._calls[method])]


async def _strike(faults: list[Fault], *, late: bool) -> None:
    for fault in faults:
        if fault.late is late:
            if fault.delay:
                await anyio.sleep(fault.delay)
            if fault.error is not None:
                raise fault.error


def _changed(faults: list[Fault], answer: Any) -> Any:
    for fault in faults:
        answer = answer if fault.change is None else fault.change(answer)
    return answer


class _Faulty:
    """The common part of all proxies; a subclass per class of target has its public names."""

    def __init__(self, target: Any, plan: _Plan) -> None:
        self._target = target
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def _given(self, name: str) -> Any:
        value = getattr(self._target, name)
        return partial(self._call, name, value) if inspect.ismethod(value) else value

    def _call(self, name: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        faults = self._plan.called(name)
        if inspect.iscoroutinefunction(method):
            return self._answer(faults, method(*args, **kwargs))
        answer = method(*args, **kwargs)
        if hasattr(answer, "__aenter__"):
            return _Block(answer, faults, self._plan)
        for fault in faults:
            if fault.delay:
                raise TypeError(f"{name} is not asynchronous: it cannot wait")
            if fault.error is not None:
                raise fault.error
        return _proxy(_changed(faults, answer), self._plan)

    async def _answer(self, faults: list[Fault], call: Awaitable[Any]) -> Any:
        try:
            await _strike(faults, late=False)
        except BaseException:
            cast(Any, call).close()
            raise
        answer = await call
        if hasattr(answer, "__await__"):
            return _Pending(answer, faults)
        await _strike(faults, late=True)
        return _proxy(_changed(faults, answer), self._plan)


class _Pending:
    """A pending result whose awaiting is struck by the late faults and whose answer is changed."""

    def __init__(self, pending: Awaitable[Any], faults: list[Fault]) -> None:
        self._pending = pending
        self._faults = faults

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        answer = await self._pending
        await _strike(self._faults, late=True)
        return _changed(self._faults, answer)


class _Block:
    """An async context manager whose entering is struck; ``late`` strikes after it was entered, and leaves it."""

    def __init__(self, block: Any, faults: list[Fault], plan: _Plan) -> None:
        self._block = block
        self._faults = faults
        self._plan = plan

    async def __aenter__(self) -> Any:
        await _strike(self._faults, late=False)
        value = await self._block.__aenter__()
        try:
            await _strike(self._faults, late=True)
        except BaseException as error:
            await self._block.__aexit__(type(error), error, error.__traceback__)
            raise
        return _proxy(_changed(self._faults, value), self._plan)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        suppressed: bool | None = await self._block.__aexit__(kind, error, traceback)
        return suppressed


def _proxy(value: Any, plan: _Plan) -> Any:
    """Return a proxy of whatever has asynchronous methods; plain values are themselves."""
    kind = type(value)
    return _proxy_class(kind)(value, plan) if _has_calls(kind) else value


def _has_calls(kind: type) -> bool:
    return any(inspect.iscoroutinefunction(inspect.getattr_static(kind, name)) for name in dir(kind) if name[:1] != "_")


def _proxy_class(kind: type) -> type[_Faulty]:
    """Return a class with the public names of ``kind``, so that it fulfils the same runtime-checkable protocols."""
    members: dict[str, Any] = {
        name: property(partial(lambda self, name: self._given(name), name=name))
        for name in dir(kind)
        if name[:1] != "_"
    }
    if hasattr(kind, "__len__"):
        members["__len__"] = lambda self: len(self._target)
    return type(f"Faulty{kind.__name__}", (_Faulty,), members)
