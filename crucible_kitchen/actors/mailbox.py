"""A bounded mailbox: messages in the order of arrival, and behind them, when it is full, the senders that wait.

It knows neither actors nor supervisors. Read next: ``crucible_kitchen.actors.cell``.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from crucible_kitchen.errors import ActorError
from crucible_kitchen.loop import EventLoop, Signal

__all__ = ["Envelope", "Mailbox"]

M = TypeVar("M")
R = TypeVar("R")


class Envelope(Generic[M, R]):
    """One message on its way, and whoever waits for what becomes of it.

    Attributes:
        sender: path of the actor that sent it; None if it was sent from outside the tree.
        since: when it was sent.
        only: the one incarnation that may handle it; None: any.
        expects_reply: False if the sender only waits until the mailbox has room.
        settled: set once the sender need not wait any more; None if it never had to wait.
        epoch: the incarnation that has it in hand; 0: none. After the answer: the one that answered.
        deaths: incarnations that it killed.
    """

    # Defaults stand in the class: what most messages never need costs them nothing.
    only: int | None = None
    expects_reply = False
    settled: Signal | None = None
    wanted = True
    epoch = 0
    deaths = 0
    reply: R | None = None
    error: ActorError | None = None

    def __init__(self, message: M, since: float, sender: str | None) -> None:
        self.message = message
        self.since = since
        self.sender = sender


class Mailbox(Generic[M, R]):
    """Holds at most ``capacity`` messages for one actor, over all its incarnations.

    The message in hand is not among them, nor one that came back from an incarnation that died: it is handled next.
    """

    def __init__(self, capacity: int, loop: EventLoop) -> None:
        self.capacity = capacity
        self.loop = loop
        self.closed: Callable[[], ActorError] | None = None  # makes each sender an error of its own
        self.arrived: Signal | None = None  # set by the actor while it waits for a message
        self._queue: OrderedDict[Envelope[M, R], None] = OrderedDict()
        self._line: OrderedDict[Envelope[M, R], None] = OrderedDict()
        self._returned: Envelope[M, R] | None = None

    @property
    def depth(self) -> int:
        """How many messages it holds."""
        return len(self._queue)

    @property
    def returned(self) -> Envelope[M, R] | None:
        """The message that came back from an incarnation that died."""
        return self._returned

    @property
    def waiting(self) -> int:
        """How many senders wait for room."""
        return len(self._line)

    @property
    def queue(self) -> Iterator[Envelope[M, R]]:
        """The messages it holds, oldest first."""
        return iter(self._queue)

    @property
    def line(self) -> Iterator[Envelope[M, R]]:
        """The messages whose senders wait for room, oldest first."""
        return iter(self._line)

    def put(self, envelope: Envelope[M, R]) -> bool:
        """Take a message in, or its sender into the line behind; return whether it was taken in.

        Raises:
            ActorError: the mailbox is closed.
        """
        if self.closed is not None:
            raise self.closed()
        if self._line or len(self._queue) >= self.capacity:
            self._line[envelope] = None
            return False
        self._queue[envelope] = None
        if (arrived := self.arrived) is not None:
            self.arrived = None
            self.loop.set(arrived)
        return True

    def take(self) -> Envelope[M, R] | None:
        """Return the next message, or None; whoever waits first gets the room."""
        if self._returned is not None:
            envelope, self._returned = self._returned, None
            return envelope
        if not self._queue:
            return None
        envelope, _ = self._queue.popitem(last=False)
        if self._line:
            self._admit()
        return envelope

    def refuse(self, envelope: Envelope[M, R], error: ActorError) -> None:
        """Give the sender an error; an incarnation that still has the message answers in vain."""
        envelope.epoch = 0
        envelope.error = error
        if envelope.settled is not None:
            self.loop.set(envelope.settled)

    def give_back(self, envelope: Envelope[M, R]) -> None:
        """Take back the message that an incarnation had in hand; it is handled next, unless nobody wants the reply."""
        envelope.epoch = 0
        if envelope.wanted:
            self._returned = envelope

    def withdraw(self, envelope: Envelope[M, R]) -> None:
        """Take out a message whose sender gave up. One in hand is handled to its end, and its reply is dropped."""
        envelope.wanted = False
        if envelope in self._line:
            del self._line[envelope]
        elif envelope in self._queue:
            del self._queue[envelope]
            self._admit()
        elif envelope is self._returned:
            self._returned = None

    def close(self, error: Callable[[], ActorError], *, drain: bool) -> None:
        """Refuse what comes from now on and all who wait for room; unless it is drained, also what it holds."""
        self.closed = error
        refused = [*self._line] if drain else [*([self._returned] if self._returned else []), *self._queue, *self._line]
        self._line.clear()
        if not drain:
            self._queue.clear()
            self._returned = None
        for envelope in refused:
            self.refuse(envelope, error())
        if self.arrived is not None:
            self.loop.set(self.arrived)

    def _admit(self) -> None:
        """Take in whoever waits first; the actor does not wait meanwhile, or there would be no line."""
        while self._line and len(self._queue) < self.capacity:
            envelope, _ = self._line.popitem(last=False)
            self._queue[envelope] = None
            if not envelope.expects_reply and envelope.settled is not None:
                self.loop.set(envelope.settled)
