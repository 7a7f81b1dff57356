"""Supervisors: a tree that starts actors, restarts those that die, gives up upwards, and stops all of them in order.

It knows children by four verbs only: begin, halt, ready, due. Read next: ``crucible_kitchen.actors.cell``.
"""

import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar, overload

import anyio
import anyio.abc

from crucible_kitchen.actors.cell import Cell, describe
from crucible_kitchen.actors.ref import ActorRef
from crucible_kitchen.actors.spec import ChildSpec, Spec, SupervisorSpec, Window
from crucible_kitchen.actors.statistics import ActorStatistics, Quarantined
from crucible_kitchen.errors import ActorError, ActorStopped, CleanupError, ConfigError, TooManyRestarts
from crucible_kitchen.loop import EventLoop
from crucible_kitchen.waits import Waiting, sourced

__all__ = ["Supervisor", "supervise"]

M = TypeVar("M")
R = TypeVar("R")
Child: TypeAlias = "Cell[Any, Any] | Supervisor"


class Tree:
    """What all supervisors of one ``supervise`` share.

    Attributes:
        group: runs every task of the tree.
        failure: what the supervisor at the root gave up with.
        troubles: what went wrong while the tree was stopped.
        stopping: whether its block has ended.
    """

    def __init__(
        self,
        group: anyio.abc.TaskGroup,
        quarantine: Callable[[Quarantined], object],
        warn: Callable[[str, str], object],
    ) -> None:
        self.group = group
        self.loop = EventLoop()
        self.failure: TooManyRestarts | None = None
        self.troubles: list[CleanupError] = []
        self.stopping = False
        self.warn = warn
        self._quarantine = quarantine

    def quarantine(self, message: Quarantined) -> None:
        """Hand over a message that is not delivered again."""
        self.warn("actor.quarantined", f"{message.path}: a message is not delivered again: {describe(message.error)}")
        self._quarantine(message)

    def fail(self, failure: TooManyRestarts) -> None:
        """End the block of the tree with this failure."""
        self.failure = failure
        self.group.cancel_scope.cancel()


class Supervisor:
    """Starts its children, restarts those that die by its spec, and gives up when they die too often. See `supervise`.

    One task does all of it, in turn, so that two deaths at once are two decisions one after the other.
    """

    def __init__(self, spec: SupervisorSpec, tree: Tree, parent: "Supervisor | None") -> None:
        self.spec = spec
        self.tree = tree
        self.parent = parent
        self.path: str = f"{parent.path}/{spec.name}" if parent else spec.name
        self.rng = random.Random(f"{parent.spec.seed if parent else 0}:{self.path}")
        self.due: float | None = None
        self._window = Window(spec.restarts)
        self._children: dict[str, Child] = {child.name: self._made(child) for child in spec.children}
        self._deaths: deque[tuple[Child, Exception]] = deque()
        self._wake = tree.loop.event()
        self._scope: anyio.CancelScope | None = None
        self._stopped = False  # for good
        self._complete = False  # whether all children have been ready since it began
        self._ended = tree.loop.event()

    def _made(self, spec: Spec) -> Child:
        return Supervisor(spec, self.tree, self) if isinstance(spec, SupervisorSpec) else Cell(spec, self)

    # -- for its users ----------------------------------------------------------------------------------------------

    @overload
    async def start(self, spec: ChildSpec[M, R]) -> ActorRef[M, R]: ...
    @overload
    async def start(self, spec: SupervisorSpec) -> "Supervisor": ...

    async def start(self, spec: Spec) -> "ActorRef[Any, Any] | Supervisor":
        """Start one more child behind the others, and return it once it is ready.

        If this is cancelled, the child is stopped again.

        Raises:
            ConfigError: a child has this name already.
            ActorStopped: the tree is being stopped; or a temporary child died before it was ready.
        """
        if self._stopped or self.tree.stopping or self.tree.failure is not None:
            raise ActorStopped(f"the supervisor {self.path} has stopped")
        if spec.name in self._children:
            raise ConfigError(f"supervisor {self.path!r} has a child named {spec.name!r} already")
        child = self._children[spec.name] = self._made(spec)
        if self.alive:
            child.due = self.tree.loop.time()
            self.wake()
        try:
            await child.until_ready()
        except BaseException:
            if self._children.get(spec.name) is child:
                await self.stop(spec.name)
            raise
        return child if isinstance(child, Supervisor) else ActorRef(child)

    async def stop(self, name: str) -> None:
        """Stop a child for good: it handles what its mailbox holds (if it drains), then its name is free.

        Raises:
            ActorError: there is no such child.
        """
        child = self._children.pop(name, None)
        if child is None:
            raise ActorError(f"supervisor {self.path!r} has no child named {name!r}")
        self.wake()
        await self._halt(child, final=True, drain=True)

    @overload
    def ref(self, child: ChildSpec[M, R]) -> ActorRef[M, R]: ...
    @overload
    def ref(self, child: str) -> ActorRef[Any, Any]: ...

    def ref(self, child: ChildSpec[Any, Any] | str) -> ActorRef[Any, Any]:
        """Return the address of an actor anywhere below, by its spec or by its path from here.

        Raises:
            ActorError: there is no such actor.
        """
        for cell in self._cells():
            if cell.spec is child or cell.path == f"{self.path}/{child}":
                return ActorRef(cell)
        name = child if isinstance(child, str) else child.name
        raise ActorError(f"there is no actor {name!r} below the supervisor {self.path!r}")

    def statistics(self) -> tuple[ActorStatistics, ...]:
        """Return a snapshot of every actor below, in the order in which they were started."""
        return tuple(row for cell in self._cells() for row in cell.statistics())

    def waiting(self) -> tuple[Waiting, ...]:
        """Return who waits for what, and since when: what every actor below waits for, and who waits for them."""
        return tuple(edge for cell in self._cells() for edge in cell.waits())

    @property
    def moves(self) -> int:
        """A number that changes whenever an actor below handled a message, was started or died."""
        return sum(cell.handled + cell.quarantined + cell.epoch for cell in self._cells())

    def _cells(self) -> Iterator[Cell[Any, Any]]:
        for child in self._children.values():
            if isinstance(child, Supervisor):
                yield from child._cells()
            else:
                yield child

    # -- as a child of its parent -----------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it supervises."""
        return self._scope is not None

    @property
    def ready(self) -> bool:
        """Whether all its children have started."""
        return self.alive and all(child.ready for child in self._children.values())

    def begin(self) -> None:
        """Start all children, with a clean record."""
        self.due = None
        self._window.clear()
        self._deaths.clear()
        self._complete = False
        now = self.tree.loop.time()
        for child in self._children.values():
            child.due = now
        self._scope = anyio.CancelScope(shield=True)
        self._ended = self.tree.loop.event()
        self.tree.group.start_soon(self._supervise, self._scope)

    async def halt(self, *, final: bool, drain: bool) -> None:
        """Stop supervising, then all children, newest first, shielded."""
        self.due, self._stopped = None, final
        with anyio.CancelScope(shield=True):
            if self._scope is not None:
                self._scope.cancel()
                await self._ended.wait()
            await self._halt_all(final=final, drain=drain)

    async def until_ready(self) -> None:
        """Wait until all its children have started.

        Raises:
            ActorStopped: one of them has stopped for good before that.
        """
        for child in list(self._children.values()):
            await child.until_ready()

    def stopped_for_good(self) -> None:
        """Refuse every message to any actor below."""
        for cell in self._cells():
            cell.stopped_for_good()

    # -- what its children tell it ----------------------------------------------------------------------------------

    def child_died(self, child: Child, error: Exception) -> None:
        """Hear of a child's death."""
        self._deaths.append((child, error))
        self.wake()

    def wake(self) -> None:
        """Have it look again; its parent too, which may wait until all here are ready."""
        self._wake.set()
        if self.parent is not None and self.ready:
            self.parent.wake()

    # -- supervision ------------------------------------------------------------------------------------------------

    async def _supervise(self, scope: anyio.CancelScope) -> None:
        failure: TooManyRestarts | None = None
        with scope:
            while failure is None:
                self._wake = self.tree.loop.event()
                failure = await self._answer_deaths()
                nearest = math.inf if failure else self._begin_due()
                if failure is None and not self._deaths:
                    with anyio.CancelScope(deadline=nearest):
                        await self._wake.wait()
            await self._give_up(failure)
        self._scope = None
        self._ended.set()
        if failure is not None and self.parent is not None and not scope.cancelled_caught:
            self.parent.child_died(self, failure)

    def _begin_due(self) -> float:
        """Begin the children whose time has come; return when the next one's will."""
        now, nearest = self.tree.loop.time(), math.inf
        for child in self._children.values():
            if child.due is not None and child.due <= now:
                child.begin()
            elif child.due is not None:
                nearest = min(nearest, child.due)
            if not child.ready and (self.spec.strategy == "rest_for_one" or not self._complete):
                break
        else:
            self._complete = True
        return nearest

    async def _answer_deaths(self) -> TooManyRestarts | None:
        """Decide for each death what follows; return a failure if there were too many."""
        while self._deaths:
            child, error = self._deaths.popleft()
            name, now = child.spec.name, self.tree.loop.time()
            if self._children.get(name) is not child:
                continue
            if isinstance(child, Cell) and child.spec.restart == "temporary":
                del self._children[name]
                child.stopped_for_good()
                self.tree.warn("actor.died", f"{child.path} died and is not restarted: {describe(error)}")
                continue
            nth = self._window.died(name, now)
            if nth is None:
                return self._too_many(child, error)
            child.due = due = now + self.spec.restarts.delay(nth, child.rng)
            self.tree.warn("actor.died", f"{child.path} died and is restarted in {due - now:.3g} s: {describe(error)}")
            if self.spec.strategy == "rest_for_one":
                await self._halt_after(child, due)
        return None

    async def _halt_after(self, child: Child, due: float) -> None:
        children = list(self._children.values())
        for later in reversed(children[children.index(child) + 1 :]):
            await self._halt(later, final=False, drain=False)
            later.due = due

    def _too_many(self, child: Child, error: Exception) -> TooManyRestarts:
        most, within = self.spec.restarts.most, self.spec.restarts.within
        failure = TooManyRestarts(
            f"supervisor {self.path}: more than {most} deaths in {within:g} s, the last of {child.path}: "
            f"{describe(error)}",
            hint="see the cause of this error; how many are allowed is in the supervisor's restarts",
        )
        failure.__cause__ = error
        return failure

    async def _give_up(self, failure: TooManyRestarts) -> None:
        if self.parent is None:
            self.tree.fail(failure)  # first of all: the block of the tree is to end now
        await self._halt_all(final=self.parent is None, drain=False)

    async def _halt_all(self, *, final: bool, drain: bool) -> None:
        for child in reversed(list(self._children.values())):
            await self._halt(child, final=final, drain=drain)
        self._deaths.clear()

    async def _halt(self, child: Child, *, final: bool, drain: bool) -> None:
        try:
            await child.halt(final=final, drain=drain)
        except CleanupError as error:
            self.tree.warn(error.code, str(error))
            if self.tree.stopping:
                self.tree.troubles.append(error)


def _ignore(*_: object) -> None:
    """Do nothing."""


@asynccontextmanager
async def supervise(
    spec: SupervisorSpec,
    *,
    quarantine: Callable[[Quarantined], object] = _ignore,
    warn: Callable[[str, str], object] = _ignore,
) -> AsyncGenerator[Supervisor, None]:
    """Run a tree of actors for the length of a block; nothing of it outlives the block.

    When the block ends well, actors stop newest first, each after it has handled what its mailbox holds. When it fails
    or is cancelled, what is handled is cancelled and what waits is refused. Either way actors stop shielded from
    cancellation, each in at most three times its ``grace``.

    Args:
        spec: the supervisor at the root.
        quarantine: is given each message that is not delivered again; must not raise.
        warn: is told, by code and message, of deaths, quarantined messages and actors that did not stop well; must not
            raise. ``run.warn`` fits.

    Raises:
        TooManyRestarts: the supervisor at the root gave up; the block is cancelled.
        CleanupError: the block ended well, but an actor did not.

    Example::

        spec = ChildSpec("counter", Counter)
        async with supervise(SupervisorSpec("example", (spec,))) as tree:
            counter = tree.ref(spec)
            await counter.ask(1)
    """
    tree: Tree | None = None
    failure: Exception | None = None
    try:
        async with anyio.create_task_group() as group:
            tree = Tree(group, quarantine, warn)
            root = Supervisor(spec, tree, None)
            root.begin()
            ended_well = False
            try:
                await root.until_ready()
                with sourced(root):
                    yield root
                ended_well = True
            except Exception as error:  # noqa: BLE001 - raised again below, outside the task group
                failure = error
            finally:
                tree.stopping = True
                await root.halt(final=True, drain=ended_well)
    except anyio.get_cancelled_exc_class():
        if tree is None or tree.failure is None:  # what failed before the cancellation came is what is reported
            raise
    assert tree is not None
    _raise_first(tree.failure, failure, *tree.troubles)


def _raise_first(*failures: Exception | None) -> None:
    """Raise the first failure there is; the others stand in its notes."""
    there = [failure for failure in failures if failure is not None]
    for other in there[1:]:
        there[0].add_note(f"also failed: {describe(other)}")
    if there:
        raise there[0]
