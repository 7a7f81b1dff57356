"""Talking to an actor: ask and wait for the reply, or tell and go on. It knows mailboxes, not who empties them.

Read next: ``crucible_kitchen.actors.mailbox``.
"""

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from crucible_kitchen.actors.mailbox import Envelope
from crucible_kitchen.loop import Signal
from crucible_kitchen.waits import place

if TYPE_CHECKING:
    from crucible_kitchen.actors.cell import Cell

__all__ = ["ActorRef", "Reply"]

M = TypeVar("M")
R = TypeVar("R")


class Reply(NamedTuple, Generic[R]):
    """A reply, and the incarnation that gave it: two replies of one epoch come from one and the same state."""

    value: R
    epoch: int


class ActorRef(Generic[M, R]):
    """The address of an actor; stays valid when the actor is restarted. Got from ``Supervisor.start`` or ``ref``.

    Messages of one sender are handled in the order in which they were sent.
    """

    __slots__ = ("_cell",)

    def __init__(self, cell: "Cell[M, R]") -> None:
        self._cell = cell

    @property
    def path(self) -> str:
        """The names of the actor's supervisors and its own."""
        return self._cell.path

    @property
    def epoch(self) -> int:
        """How many incarnations there have been; 0 before the first."""
        return self._cell.epoch

    async def ask(self, message: M, *, epoch: int | None = None) -> R:
        """Send a message and return the reply; waits for room in the mailbox, and through restarts of the actor.

        Cancelling takes the message out of the mailbox and frees its place; one that is being handled is handled to
        its end, and its reply is dropped.

        Args:
            message: what to handle. If the actor dies of it, the next incarnation gets it again.
            epoch: the one incarnation that may handle it: for what makes no sense once its state is lost.

        Raises:
            ActorRestarted: that incarnation is gone.
            ActorStopped: the actor has stopped, or stopped before it answered.
            MessageQuarantined: the message killed the actor too often; ``__cause__`` is what it died of last.
        """
        settled = self._cell.loop.signal()
        envelope = self._send(message, epoch, settled)
        try:  # not by way of another coroutine, which costs a tenth of the whole
            await settled
        except BaseException:
            self._cell.mailbox.withdraw(envelope)
            raise
        if envelope.error is not None:
            raise envelope.error
        return envelope.reply  # type: ignore[return-value]

    async def call(self, message: M, *, epoch: int | None = None) -> Reply[R]:
        """Do as :meth:`ask`, and say which incarnation replied."""
        settled = self._cell.loop.signal()
        envelope = self._send(message, epoch, settled)
        await self._until_settled(envelope, settled)
        return Reply(envelope.reply, envelope.epoch)  # type: ignore[arg-type]

    async def tell(self, message: M) -> None:
        """Send a message that nobody awaits the reply of; waits, and can be cancelled, only while the mailbox is full.

        Raises:
            ActorStopped: the actor has stopped.
        """
        cell = self._cell
        envelope: Envelope[M, R] = Envelope(message, cell.loop.time(), place.get())
        if not cell.mailbox.put(envelope):
            envelope.settled = settled = cell.loop.signal()
            await self._until_settled(envelope, settled)

    def kill(self, reason: str) -> None:
        """Have the present incarnation die, as if what it does had failed; for one that hangs.

        It is cancelled and has ``grace`` seconds to end; whether or not it does, the next one follows.
        """
        self._cell.kill(reason)

    def _send(self, message: M, epoch: int | None, settled: Signal) -> Envelope[M, R]:
        cell = self._cell
        envelope: Envelope[M, R] = Envelope(message, cell.loop.time(), place.get())
        envelope.expects_reply, envelope.settled = True, settled
        if epoch is not None:
            envelope.only = epoch
        cell.mailbox.put(envelope)
        return envelope

    async def _until_settled(self, envelope: Envelope[M, R], settled: Signal) -> None:
        try:
            await settled
        except BaseException:
            self._cell.mailbox.withdraw(envelope)
            raise
        if envelope.error is not None:
            raise envelope.error
