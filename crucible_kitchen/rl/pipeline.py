"""From problems to batches: env groups as supervised actors, a bounded queue, and the gate that bounds staleness.

It knows what a group is worth (usable, how old), not what is in it; it runs on any clock. Read next:
``env_group.py``, ``ledgers.py`` and ``measures.py`` beside this.
"""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import anyio

from crucible_kitchen.actors import ActorRef, ChildSpec, SupervisorSpec, supervise
from crucible_kitchen.errors import CrucibleError, EnvironmentFault, MessageQuarantined
from crucible_kitchen.loop import EventLoop
from crucible_kitchen.rl.batch import Batch
from crucible_kitchen.rl.env_group import RESTARTS, EnvGroup, Fatal, Job, Produce
from crucible_kitchen.rl.ledgers import RolloutLedger, TimeLedger
from crucible_kitchen.rl.measures import Measures
from crucible_kitchen.rl.plan import PipelinePlan, Rolled
from crucible_kitchen.rl.trajectories import Ticket
from crucible_kitchen.types import JsonObject
from crucible_kitchen.waits import waiting

__all__ = ["Rollouts"]

G = TypeVar("G", bound=Rolled)


class Rollouts(Generic[G]):
    """All rollouts of a run: draws problems, has them rolled out, and gives them to the learner batch by batch.

    At most ``plan.ahead`` groups are drawn and not yet trained, wherever they are. Iterate over it inside ``running``.

    Args:
        plan: how many, how far ahead.
        order: problem number by index of drawing; unset: a seeded order, anew for every pass.
        fatal: errors that end the run at once.
        dropped: told of each group that is given up: its index and why.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        *,
        order: Callable[[int], int],
        fatal: tuple[type[Exception], ...] = (),
        dropped: Callable[[int, str], object] = lambda _index, _why: None,
    ) -> None:
        self.plan = plan
        self.ledger = RolloutLedger()
        self.version = 0
        self.measured = Measures()
        self._order = order
        self._fatal = fatal
        self._told = dropped
        self._next = 0
        self._carried: JsonObject | None = None  # where the last group stopped
        self._again: deque[int] = deque()
        self._flying: dict[int, Job] = {}
        self._queue: deque[G] = deque()
        self._batch: Batch[G] | None = None
        self._in_vain = 0
        self._failure: Exception | None = None
        self._resumed = False
        self._earlier: dict[str, dict[str, float]] = {"learner": {}, "workers": {}}
        self._loop: EventLoop
        self._room: anyio.Event  # a problem may be drawn now
        self._begun: anyio.Event  # the first turn was asked for
        self._arrival: anyio.Event  # the learner has something to look at
        self.learner: TimeLedger
        self.workers: list[TimeLedger] = []

    # -- the run ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(
        self,
        produce: Produce[G],
        *,
        warn: Callable[[str, str], object] = lambda _code, _text: None,
    ) -> AsyncGenerator["Rollouts[G]", None]:
        """Have problems rolled out for the length of a block; nothing of it outlives the block.

        Args:
            produce: rolls out one problem. What it raises kills its actor.
            warn: see ``supervise``.
        """
        self._loop = EventLoop()
        self._room, self._arrival, self._begun = self._loop.event(), self._loop.event(), self._loop.event()
        self.workers = []
        self.learner = TimeLedger(self._loop.time, "start", self._earlier["learner"])
        count = max(1, min(self.plan.workers, self.plan.ahead))
        make = partial(EnvGroup, produce, self._fatal)
        specs = tuple(
            ChildSpec(f"env-group-{i}", make, capacity=1, drain=False, quarantine_after=self.plan.quarantine_after)
            for i in range(count)
        )
        tree_spec = SupervisorSpec("rollouts", specs, restarts=RESTARTS, seed=self.plan.seed)
        failure: Exception | None = None
        async with supervise(tree_spec, warn=warn) as tree, anyio.create_task_group() as tasks:
            for spec in specs:
                time = TimeLedger(self._loop.time, "gate", None if self.workers else self._earlier["workers"])
                self.workers.append(time)
                tasks.start_soon(self._work, tree.ref(spec), time)
            try:
                yield self
            except Exception as error:  # noqa: BLE001 - raised below, outside the group that would wrap it
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def __aiter__(self) -> AsyncIterator[Batch[G]]:
        """Iterate over one batch per update, until all are taken; each must be ``trained`` before the next."""
        self._begun.set()
        return self

    async def __anext__(self) -> Batch[G]:
        if self._batch is not None:
            raise RuntimeError("the batch was not trained: call trained() before the next")
        if self._resumed:
            self._resumed = False
            return Batch(self, self.version - 1, over=True)
        if self.version >= self.plan.batches:
            raise StopAsyncIteration
        self._batch = Batch(self, self.version)
        return self._batch

    def _has_room(self) -> None:
        room, self._room = self._room, self._loop.event()
        room.set()

    def _has_arrived(self) -> None:
        arrival, self._arrival = self._arrival, self._loop.event()
        arrival.set()

    # -- the workers' side --------------------------------------------------------------------------------------------

    async def _work(self, worker: ActorRef[Job, Any], time: TimeLedger) -> None:
        await self._begun.wait()
        while (job := await self._draw(time)) is not None:
            time.enter("rollout")
            try:
                result = await worker.ask(job)
            except MessageQuarantined as error:
                del self._flying[job.ticket.index]
                self._drop(job.ticket.index, f"quarantined: {_says(error.__cause__)}", lost=True)
            else:
                del self._flying[job.ticket.index]
                self._arrived(job.ticket.index, result)
            self._has_arrived()
            time.enter("gate")

    async def _draw(self, time: TimeLedger) -> Job | None:
        """Return the next problem once it may be drawn, or None when all are."""
        while not self._may_draw():
            if self.ledger.trained + self._open >= self._wanted and self.version >= self.plan.batches:
                time.enter("done")
                return None
            await self._room.wait()
        if self._again:
            index = self._again.popleft()
            self.ledger.requeued += 1
        else:
            index, self._next = self._next, self._next + 1
            self.ledger.drawn += 1
        ticket = Ticket(index, self._order(index), self._carried)
        job = Job(ticket, self.version, began=self._loop.time())
        if self.plan.staleness == "cancel":
            job.scope = anyio.CancelScope()
        self._flying[index] = job
        return job

    @property
    def _wanted(self) -> int:
        return self.plan.batches * self.plan.per_batch

    @property
    def _open(self) -> int:
        """Groups drawn, and neither trained nor dropped; those still to be drawn again are not among them."""
        taken = len(self._batch.groups) if self._batch is not None else 0
        return len(self._flying) + len(self._queue) + taken

    def _may_draw(self) -> bool:
        return self._open < self.plan.ahead and self.ledger.trained + self._open < self._wanted

    def _arrived(self, index: int, result: Any) -> None:
        if isinstance(result, Fatal):
            self._failure = self._failure or result.error
            self._drop(index, "fatal")
        elif result is None:
            self._drop(index, "cancelled")
        else:
            self.measured.sampled(result)
            self._carried = result.carried
            if (why := result.unusable) is not None:
                self.measured.wasted(result)
                self._drop(index, why, lost=True)
            else:
                self._in_vain = 0
                self._queue.append(result)

    def _drop(self, index: int, why: str, *, lost: bool = False) -> None:
        """Give a group up; too many lost ones in a row are a failure of the run."""
        self.ledger.dropped[why.partition(":")[0]] += 1
        self._told(index, why)
        self._in_vain += lost
        if self._in_vain >= max(16, 2 * self.plan.ahead) and self._failure is None:
            self._failure = EnvironmentFault(
                f"{self._in_vain} groups in a row came to nothing, the last because: {why}",
                hint="try the environment by itself; see the rl.group_dropped events",
            )
        self._has_room()

    # -- the learner's side -------------------------------------------------------------------------------------------

    async def take(self, batch: Batch[G]) -> G:
        """Return the next group for a batch, and wait for it."""
        while True:
            if self._failure is not None:
                raise self._failure
            group = self._pick(batch)
            if group is not None:
                self.learner.enter("compute")
                return group
            self.learner.enter("wait")
            with waiting("item", self._awaited()):
                await self._arrival.wait()

    def _awaited(self) -> str:
        """Return what the learner waits for, in words: the group that has been out longest."""
        longest = min(self._flying.values(), key=lambda job: job.began, default=None)
        return f"rollouts, of which group {longest.ticket.index} has been out longest" if longest else "rollouts"

    def _pick(self, batch: Batch[G]) -> G | None:
        plan = self.plan
        if plan.in_order:
            first = min((g.ticket.index for g in self._queue), default=None)
            if first is None or any(index < first for index in (*self._flying, *self._again)):
                return None
            return self._out(next(g for g in self._queue if g.ticket.index == first))
        if plan.staleness == "aggregate":
            return self._queue.popleft() if self._queue else None
        if plan.staleness == "block":
            return self._pick_blocking(batch)
        for group in list(self._queue):  # discard, cancel: what is too old is given up
            self._queue.remove(group)
            if self.version - oldest(group) <= plan.max_staleness:
                return group
            self.measured.wasted(group)
            self._drop(group.ticket.index, "stale")
        return None

    def _pick_blocking(self, batch: Batch[G]) -> G | None:
        """Return a group such that no other one becomes too old by waiting for the next update."""
        due = self.version - self.plan.max_staleness
        overdue = next((g for g in self._queue if oldest(g) <= due), None)
        if overdue is not None:
            return self._out(overdue)
        late = sum(job.version <= due for job in self._flying.values())
        room = self.plan.per_batch - len(batch.groups)
        return self._queue.popleft() if self._queue and room > late else None

    def _out(self, group: G) -> G:
        self._queue.remove(group)
        return group

    def trained(self, batch: Batch[G]) -> None:
        """Count a batch as trained: its places are free, and what is sampled from now on is one version newer.

        Raises:
            LedgerBroken: the ledger does not add up.
        """
        for group in batch.groups:
            self.measured.trained(group, batch.update)
        self.ledger.trained += len(batch.groups)
        self._batch = None
        self.version = batch.update + 1
        self.learner.enter("between")
        self.check()
        if self.plan.staleness == "cancel":
            for job in self._flying.values():
                if self.version - job.version > self.plan.max_staleness and job.scope is not None:
                    job.scope.cancel()
        self._has_room()

    # -- for whoever looks --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that the ledger adds up: see ``RolloutLedger.check``."""
        taken = len(self._batch.groups) if self._batch is not None else 0
        self.ledger.check(buffered=len(self._queue) + taken, in_flight=len(self._flying) + len(self._again))

    @property
    def depth(self) -> int:
        """Groups in the queue."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Groups that are being rolled out."""
        return len(self._flying)

    def waiting_for(self) -> Sequence[tuple[int, float]]:
        """Return the groups that are being rolled out, the longest first: index and seconds."""
        now = self._loop.time()
        return sorted(((i, now - job.began) for i, job in self._flying.items()), key=lambda pair: -pair[1])

    def seconds(self) -> dict[str, dict[str, float]]:
        """Return the time ledger: seconds of the ``learner`` and of all ``workers`` together, by cause."""
        if not self.workers:
            return self._earlier
        workers: dict[str, float] = {}
        for worker in self.workers:
            for cause, seconds in worker.spent().items():
                workers[cause] = workers.get(cause, 0.0) + seconds
        return {"learner": dict(self.learner.spent()), "workers": workers}

    @property
    def efficiency(self) -> float:
        """Overlap efficiency so far: the greater of the learner's and the workers' work, over the wall clock."""
        spent = self.learner.spent()
        learned = spent.get("compute", 0.0)
        ideal = max(learned, self.measured.seconds / len(self.workers))
        return ideal / self.learner.wall if self.learner.wall else 0.0

    @property
    def length_bias(self) -> float:
        """See ``Measures.length_bias``."""
        return self.measured.length_bias(kept=self.ledger.trained + len(self._queue))

    # -- position -----------------------------------------------------------------------------------------------------

    def position(self) -> JsonObject:
        """Return where the rollouts are; what is buffered or in flight is drawn again from there, with equal seeds."""
        taken = self._batch.groups if self._batch is not None else []
        tickets = [*(g.ticket for g in (*self._queue, *taken)), *(job.ticket for job in self._flying.values())]
        first = min(tickets, key=lambda ticket: ticket.index, default=None)
        return {
            "version": self.version,
            "next": self._next,
            "again": sorted({ticket.index for ticket in tickets} | set(self._again)),
            "carried": first.carried if first is not None else self._carried,
            "over": self._batch is None and self.version > 0,
            "ledger": self.ledger.to_json(),
            "seconds": self.seconds(),
            **self.measured.to_json(),
        }

    def seek(self, position: JsonObject) -> None:
        """Go on from a position; call it before the first batch."""
        self.version, self._next = position["version"], position["next"]
        self._again = deque(position["again"])
        self._carried = position.get("carried")  # of an earlier version: nothing went on
        self._resumed = position["over"]
        self.ledger = RolloutLedger.from_json(position["ledger"])
        self._earlier = position.get("seconds", self._earlier)
        self.measured = Measures.from_json(position)


def oldest(group: Rolled) -> int:
    """Return the oldest policy version that sampled a group."""
    return int(group.versions().min())


def _says(error: BaseException | None) -> str:
    return error.message if isinstance(error, CrucibleError) else type(error).__name__
