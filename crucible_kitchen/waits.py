"""Who waits for what in a run, and since when: the wait-for graph by which a stall is told.

Whoever may wait for long says so where it begins: ``with waiting("call", "torch: forward"): await ...``. Outside a run
that does nothing. Whatever keeps such an account itself (a tree of actors) is a :class:`Source` and costs nothing until
it is asked. This file knows no stage, no actor and no queue. Read next: ``crucible_kitchen.workflow.watchdog``.
"""

import gc
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Protocol, TypeAlias

from crucible_kitchen.loop import EventLoop

__all__ = [
    "Cause",
    "Source",
    "Waiting",
    "Waits",
    "culprit",
    "current_waits",
    "place",
    "sourced",
    "standing",
    "waiting",
]

Cause: TypeAlias = Literal[
    "stage", "open", "close", "item", "room", "call", "thread", "process", "log",
    "message", "handler", "reply", "start", "stop", "restart",
]  # fmt: skip

place: ContextVar[str | None] = ContextVar("crucible_place", default=None)
"""Who the running code is: the path of a stage or of an actor; None outside both."""

current_waits: ContextVar["Waits | None"] = ContextVar("crucible_waits", default=None)
"""The account of the run that the running code is part of."""

_SAYS: dict[str, str] = {
    "stage": "is in its own code",
    "open": "is being opened",
    "close": "is being closed",
    "item": "waits for the next item of {whom}",
    "room": "waits for room in {whom}",
    "call": "waits for the call {whom}",
    "thread": "waits for {whom} in a thread",
    "process": "waits for {whom} in another process",
    "log": "waits for {whom} to be on disk",
    "message": "waits for a message",
    "handler": "handles a message",
    "reply": "waits for the reply of {whom}",
    "start": "is starting",
    "stop": "is stopping",
    "restart": "waits to be restarted",
}

_VAGUE = frozenset({"stage", "handler"})

_PLUMBING = ("asyncio", "anyio", "trio", "contextlib", "threading", "concurrent", "crucible_kitchen.w")
"""Modules in which nobody is to be told that a task stands: event loops, and our workers, waits and workflow."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One edge of who waits for what.

    Attributes:
        who: path of a stage or an actor; empty for a task that is neither.
        cause: ``stage``: it awaits something of its own; ``open``, ``close``: its resource's first and last part;
            ``item``, ``room``: the next item of the loop or queue ``whom``, room in the queue or mailbox ``whom``;
            ``call``, ``thread``, ``process``, ``log``: a backend's call, a function in a thread or in another process,
            records of the log;
            ``message``: its mailbox is empty; ``handler``: its own ``handle`` awaits something; ``reply``: the reply of
            the actor ``whom``; ``start``, ``stop``: its own hook; ``restart``: the end of its back-off.
        whom: what it waits for; empty if that is itself.
        since: when that began, on the event loop's clock.
        at: where its code stands, ``module:function:line``; empty if it is not known.
    """

    who: str
    cause: Cause
    whom: str
    since: float
    at: str = ""

    def says(self) -> str:
        """Return the edge in words, without the time."""
        return f"{self.who or 'a task'} {_SAYS[self.cause].format(whom=self.whom)}"


class Source(Protocol):
    """What keeps an account of its own."""

    @property
    def moves(self) -> int:
        """A number that changes whenever something moves."""
        ...

    def waiting(self) -> Iterable[Waiting]:
        """Return its edges."""
        ...


class Waits:
    """The account of one run. Everything here runs on the event loop.

    Attributes:
        now: the event loop's clock.
        count: how many waits began or ended; whoever sees something else move adds to it.
        stages: the stages that have begun and not ended, each with since when and in which task.
        open: the waits that have begun and not ended, each with whose, since when and in which task.
    """

    def __init__(self, loop: EventLoop) -> None:
        self.now = loop.time
        self.task = loop.task
        self.count = 0
        self.stages: dict[str, tuple[float, Any]] = {}
        self.open: dict[waiting, tuple[str | None, float, Any]] = {}
        self._sources: list[Source] = []

    @property
    def moves(self) -> int:
        """A number that changes whenever something of the run moves."""
        return self.count + sum(source.moves for source in self._sources)

    def began(self, path: str) -> None:
        """Hear that a stage began, in the task that runs it."""
        self.count += 1
        place.set(path)
        self.stages[path] = (self.now(), self.task())

    def ended(self, path: str) -> None:
        """Hear that a stage ended."""
        self.count += 1
        self.stages.pop(path, None)

    def snapshot(self) -> list[Waiting]:
        """Return all edges there are now, the oldest first; ``stage`` and ``handler`` only where nothing else is."""
        edges = [
            Waiting(who or "", wait.cause, wait.whom, since, standing(task))
            for wait, (who, since, task) in self.open.items()
        ]
        edges += [edge for source in self._sources for edge in source.waiting()]
        edges += [Waiting(path, "stage", "", since, standing(task)) for path, (since, task) in self.stages.items()]
        known = {edge.who for edge in edges if edge.cause not in _VAGUE}
        told = [edge for edge in edges if edge.cause not in _VAGUE or edge.who not in known]
        return sorted(told, key=lambda edge: edge.since)

    @contextmanager
    def with_source(self, source: Source) -> Generator[None, None, None]:
        """Ask a source too, as long as the block lasts."""
        self._sources.append(source)
        try:
            yield
        finally:
            self._sources.remove(source)
            self.count += source.moves + 1  # what the run has moved never goes back


class waiting:  # noqa: N801 - read as a word of the sentence it stands in
    """A block in which the running code waits for something: ``with waiting("room", "rollouts"): await ...``."""

    __slots__ = ("_waits", "cause", "whom")

    def __init__(self, cause: Cause, whom: str = "") -> None:
        self.cause: Cause = cause
        self.whom = whom
        self._waits = current_waits.get()

    def __enter__(self) -> None:
        waits = self._waits
        if waits is not None:
            waits.count += 1
            waits.open[self] = (place.get(), waits.now(), waits.task())

    def __exit__(self, *_: object) -> None:
        waits = self._waits
        if waits is not None:
            waits.count += 1
            del waits.open[self]


@contextmanager
def sourced(source: Source) -> Generator[None, None, None]:
    """Make a source part of the run that the running code belongs to, as long as the block lasts."""
    waits = current_waits.get()
    if waits is None:
        yield
    else:
        with waits.with_source(source):
            yield


def culprit(edges: Sequence[Waiting]) -> list[Waiting]:
    """Return what everything waits for: the circle that there is, else the end of the chain that most others lead to.

    An actor that waits for a message waits for work, and is told only if nothing else waits.
    """
    busy = [edge for edge in edges if edge.cause != "message"]
    outgoing: dict[str, list[Waiting]] = {}
    for edge in busy:
        outgoing.setdefault(edge.who, []).append(edge)
    reached: dict[Waiting, int] = {}
    for edge in busy:
        chain = _chain(edge, outgoing)
        if chain[-1].whom in {e.who for e in chain}:
            return chain[[e.who for e in chain].index(chain[-1].whom) :]
        reached[chain[-1]] = reached.get(chain[-1], 0) + 1
    if not reached:
        return list(edges[:1])
    return [max(reached, key=lambda edge: (reached[edge], -edge.since))]


def _chain(edge: Waiting, outgoing: dict[str, list[Waiting]]) -> list[Waiting]:
    """Follow an edge to what it waits for, and on: to an end, or to where the circle closes."""
    chain, seen = [edge], {edge.who}
    while (following := outgoing.get(chain[-1].whom)) and chain[-1].whom and chain[-1].whom not in seen:
        seen.add(chain[-1].whom)
        chain.append(following[0])
    return chain


# -- where tasks stand --------------------------------------------------------------------------------------------


def standing(task: Any) -> str:
    """Return where a task stands, ``module:function:line``: the innermost frame that is not an event loop's or ours."""
    coroutine = task.get_coro() if hasattr(task, "get_coro") else getattr(task, "coro", None)
    found = ""
    for frame in _frames(coroutine):
        module = str(frame.f_globals.get("__name__", "?"))
        if not module.startswith(_PLUMBING):
            found = f"{module}:{frame.f_code.co_qualname}:{frame.f_lineno}"
    return found


def _frames(awaitable: Any) -> Iterator[FrameType]:
    """Yield the frames of what awaits what, outermost first."""
    while awaitable is not None:
        frame = next((f for a in ("cr_frame", "gi_frame", "ag_frame") if (f := getattr(awaitable, a, None))), None)
        if frame is not None:
            yield frame
        following = next(
            (n for a in ("cr_await", "gi_yieldfrom", "ag_await") if (n := getattr(awaitable, a, None))), None
        )
        if following is None and type(awaitable).__name__.startswith(("async_generator", "coroutine_wrapper")):
            inner = [r for r in gc.get_referents(awaitable) if hasattr(r, "ag_frame") or hasattr(r, "cr_frame")]
            following = inner[0] if inner else None
        awaitable = following
