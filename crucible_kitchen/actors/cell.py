"""One actor over all its incarnations: the task each runs in, its end, and what becomes of the message in hand.

It decides nothing about restarts. Read next: ``crucible_kitchen.actors.supervisor``.
"""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from crucible_kitchen.actors.actor import Actor
from crucible_kitchen.actors.mailbox import Envelope, Mailbox
from crucible_kitchen.actors.spec import ChildSpec
from crucible_kitchen.actors.statistics import ActorStatistics, Quarantined, State
from crucible_kitchen.errors import (
    ActorError,
    ActorRestarted,
    ActorStopped,
    CleanupError,
    CrucibleError,
    MessageQuarantined,
)
from crucible_kitchen.waits import Cause, Waiting, place, standing

if TYPE_CHECKING:
    from crucible_kitchen.actors.supervisor import Supervisor

__all__ = ["Cell", "describe"]

M = TypeVar("M")
R = TypeVar("R")


def describe(error: BaseException) -> str:
    """Return what an error is in a few words; a foreign one's text stays in the error, because it may quote data."""
    return str(error) if isinstance(error, CrucibleError) else type(error).__name__


class Cell(Generic[M, R]):
    """One child that is an actor.

    Attributes:
        due: when it is to be started; None: it runs, or never will again.
        ready: whether its present incarnation has started.
    """

    def __init__(self, spec: ChildSpec[M, R], parent: "Supervisor") -> None:
        self.spec = spec
        self.parent = parent
        self.path: str = f"{parent.path}/{spec.name}"
        self.loop = parent.tree.loop
        self.mailbox: Mailbox[M, R] = Mailbox(spec.capacity, self.loop)
        self.rng = random.Random(f"{parent.spec.seed}:{self.path}")
        self.due: float | None = None
        self.down_since = self.loop.time()
        self.epoch = 0
        self.ready = False
        self.changed = self.loop.event()  # set, and made anew, when it has become ready or has stopped for good
        self.handled = self.quarantined = self.stale = 0
        self.last_error: Exception | None = None
        self.incarnation: Incarnation[M, R] | None = None

    # -- for the supervisor -----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether there is an incarnation, be it only starting or stopping."""
        return self.incarnation is not None

    def begin(self) -> None:
        """Start the next incarnation."""
        self.due = None
        self.epoch += 1
        self.incarnation = Incarnation(self)
        self.parent.tree.group.start_soon(self.incarnation.run)

    async def halt(self, *, final: bool, drain: bool) -> None:
        """Stop the incarnation, shielded, in at most three times ``grace``; unless final, another may follow.

        Raises:
            CleanupError: it failed to stop, or not in time.
        """
        self.due = None
        incarnation, drain = self.incarnation, drain and self.spec.drain
        if final:
            self.mailbox.close(self.gone, drain=drain and incarnation is not None)
        try:
            if incarnation is not None:
                await incarnation.halt(drain=final and drain)
        finally:
            if self.incarnation is incarnation:
                self._lose(incarnation)
            if final:
                self.mailbox.close(self.gone, drain=False)
                self._tell_waiters()

    def stopped_for_good(self) -> None:
        """Refuse every message, waiting and to come."""
        self.mailbox.close(self.gone, drain=False)
        self._tell_waiters()

    def gone(self) -> ActorStopped:
        """Return the error for whoever wants something of an actor that has stopped for good."""
        error = ActorStopped(f"the actor {self.path} has stopped", hint="see its last error, the cause of this one")
        error.__cause__ = self.last_error
        return error

    def kill(self, reason: str) -> None:
        """Stop the incarnation and report it dead."""
        incarnation = self.incarnation
        if incarnation is not None and not incarnation.halting:
            incarnation.halting = True
            self.parent.tree.group.start_soon(self._kill, incarnation, ActorError(f"{self.path} was killed: {reason}"))

    async def until_ready(self) -> None:
        """Wait until an incarnation has started.

        Raises:
            ActorStopped: it has stopped for good before that.
        """
        while not self.ready:
            if self.mailbox.closed is not None:
                raise self.gone()
            await self.changed.wait()

    # -- for the incarnation ----------------------------------------------------------------------------------------

    def now_ready(self) -> None:
        """Hear that the incarnation has started."""
        self.ready = True
        self._tell_waiters()
        self.parent.wake()

    def died(self, incarnation: "Incarnation[M, R]", error: Exception) -> None:
        """Hear of a death: settle the message in hand, and tell the supervisor."""
        if self.incarnation is not incarnation:
            return
        self.last_error = error
        if (envelope := incarnation.current) is not None:
            envelope.deaths += 1
            if envelope.deaths >= self.spec.quarantine_after:
                incarnation.current = None
                self._quarantine(envelope, error)
        self._lose(incarnation)
        self.parent.child_died(self, error)

    async def _kill(self, incarnation: "Incarnation[M, R]", reason: ActorError) -> None:
        try:
            await incarnation.halt(drain=False)
        except CleanupError as error:
            reason.add_note(str(error))
        self.died(incarnation, reason)

    def _lose(self, incarnation: "Incarnation[M, R] | None") -> None:
        """Be without an incarnation; the message in hand goes to the next one."""
        self.incarnation, self.ready, self.down_since = None, False, self.loop.time()
        if incarnation is not None and (envelope := incarnation.current) is not None:
            incarnation.current = None
            self.mailbox.give_back(envelope)

    def _quarantine(self, envelope: Envelope[M, R], error: Exception) -> None:
        self.quarantined += 1
        times = f"{envelope.deaths} time" + "s" * (envelope.deaths != 1)
        refused = MessageQuarantined(f"a message killed {self.path} {times}: {describe(error)}")
        refused.__cause__ = error
        self.mailbox.refuse(envelope, refused)
        self.parent.tree.quarantine(Quarantined(self.path, envelope.message, envelope.deaths, error))

    def _tell_waiters(self) -> None:
        changed, self.changed = self.changed, self.loop.event()
        changed.set()

    # -- for whoever looks ------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What it does, in one word."""
        if self.incarnation is None:
            return "stopped" if self.mailbox.closed is not None else "down"
        if self.incarnation.phase == "idle":
            return "idle" if self.incarnation.current is None else "busy"
        return self.incarnation.phase

    def statistics(self) -> Iterator[ActorStatistics]:
        """Yield one snapshot."""
        busy = self.state == "busy" and self.incarnation is not None
        yield ActorStatistics(
            path=self.path,
            state=self.state,
            epoch=self.epoch,
            depth=self.mailbox.depth,
            waiting=self.mailbox.waiting,
            handled=self.handled,
            restarts=max(0, self.epoch - 1),
            quarantined=self.quarantined,
            stale=self.stale,
            last_error=self.last_error,
            busy_since=self.incarnation.since if busy and self.incarnation else None,
        )

    def waits(self) -> Iterator[Waiting]:
        """Yield what it waits for, then what others wait for from it, oldest first."""
        causes: dict[State, Cause] = {
            "idle": "message", "busy": "handler", "starting": "start", "stopping": "stop", "down": "restart",
        }  # fmt: skip
        if (cause := causes.get(self.state)) is not None:
            since = self.incarnation.since if self.incarnation else self.down_since
            yield Waiting(self.path, cause, "", since, standing(self.incarnation.task) if self.incarnation else "")
        current = self.incarnation.current if self.incarnation else None
        for envelope in (current, self.mailbox.returned, *self.mailbox.queue):
            if envelope is not None and envelope.expects_reply and envelope.wanted:
                yield Waiting(envelope.sender or "", "reply", self.path, envelope.since)
        for envelope in self.mailbox.line:
            yield Waiting(envelope.sender or "", "room", self.path, envelope.since)


class Incarnation(Generic[M, R]):
    """One life of an actor, in one task: start, messages, stop.

    Two scopes bound it. The inner one ends the messages, so that ``stop`` runs uncancelled; the outer one, shielded
    from the tree, ends everything when its grace is over. Both are entered and left in the order that anyio wants.
    """

    def __init__(self, cell: Cell[M, R]) -> None:
        self.epoch = cell.epoch
        self.phase: State = "starting"
        self.current: Envelope[M, R] | None = None
        self.since = cell.loop.time()
        self.task: Any = None
        self.halting = False
        self._cut = False
        self._cell = cell
        self._inner = anyio.CancelScope()
        self._outer = anyio.CancelScope(shield=True)
        self._ended = cell.loop.event()
        self._death: Exception | None = None
        self._trouble: Exception | None = None

    async def run(self) -> None:
        """Live, and report how it ended unless it was told to end."""
        place.set(self._cell.path)
        self.task = self._cell.loop.task()
        try:
            with self._outer:
                await self._live()
        finally:
            self._ended.set()
        if not self.halting:
            assert self._death is not None, "an actor ends by an error or because it was told to"
            self._cell.died(self, self._death)

    async def halt(self, *, drain: bool) -> None:
        """End it: what it has to drain, then ``stop``, ``grace`` seconds for each, then without mercy.

        Raises:
            CleanupError: ``stop`` failed or was cut off, nothing could end it, or it died meanwhile.
        """
        self.halting = True
        path, grace = self._cell.path, self._cell.spec.grace
        with anyio.CancelScope(shield=True):
            if drain and self.phase == "idle":  # what has not started yet will not handle anything
                await self._wait(grace)
            self._cut = True  # looked at between messages; asking the scope would cost each of them
            self._inner.cancel()
            await self._wait(grace)
            if not self._ended.is_set():
                self._outer.cancel()
                await self._wait(grace)
        if not self._ended.is_set():
            raise CleanupError(f"the actor {path} ignores its cancellation", hint="it may shield what never ends")
        if self._outer.cancelled_caught:
            raise CleanupError(f"the actor {path} did not stop within {grace:g} s and was cancelled")
        if (trouble := self._death or self._trouble) is not None:
            self._cell.last_error = trouble
            raise CleanupError(f"the actor {path} failed as it stopped: {describe(trouble)}") from trouble

    async def _wait(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._ended.wait()

    async def _live(self) -> None:
        actor: Actor[M, R] | None = None
        try:
            with self._inner:
                actor = self._cell.spec.factory()
                await actor.start()
                self._enter("idle")
                self._cell.now_ready()
                await self._serve(actor)
        except Exception as error:  # noqa: BLE001 - whatever it is, the actor died of it
            self._death = error
        self._enter("stopping")
        if actor is not None:
            await self._stop(actor)

    async def _stop(self, actor: Actor[M, R]) -> None:
        if not self.halting:
            self._outer.deadline = self._cell.loop.time() + self._cell.spec.grace
        try:
            await actor.stop()
        except Exception as error:  # noqa: BLE001 - reported with the death, or by whoever halts it
            if self._death is None:
                self._trouble = error
            else:
                self._death.add_note(f"it also failed to stop: {describe(error)}")

    async def _serve(self, actor: Actor[M, R]) -> None:
        """Handle messages, one at a time, until the mailbox is closed and empty."""
        cell, epoch = self._cell, self.epoch
        mailbox, loop, handle = cell.mailbox, cell.loop, actor.handle
        while not self._cut:
            envelope = mailbox.take()
            if envelope is None:
                if mailbox.closed is not None:
                    return
                self.since = loop.time()
                mailbox.arrived = arrived = loop.signal()
                await arrived
                continue
            if envelope.only is not None and envelope.only != epoch:
                mailbox.refuse(envelope, ActorRestarted(f"incarnation {envelope.only} of {cell.path} is gone"))
                continue
            self.current, self.since, envelope.epoch = envelope, loop.time(), epoch
            reply = await handle(envelope.message)
            if envelope.epoch != epoch:  # it went on to another incarnation, because this one should have ended
                cell.stale += 1
                continue
            self.current, envelope.reply = None, reply
            cell.handled += 1
            if envelope.settled is not None:
                loop.set(envelope.settled)

    def _enter(self, phase: State) -> None:
        self.phase, self.since = phase, self._cell.loop.time()
