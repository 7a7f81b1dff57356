"""A training session: the async face of a ``Trainer``, whose work it passes to one thread in short turns.

Knows no tensor. Read next: ``trainer.py``, ``sampling.py``.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
import anyio.abc

from crucible_kitchen.errors import BackendUserError, CapabilityError, SessionLost
from crucible_kitchen.ports.sampling_client import Policy
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.ports.training_client import TrainingCapabilities, TrainingStepScope, require_outputs
from crucible_kitchen.types import (
    AdamParams,
    Datum,
    ExportedModel,
    ForwardBackwardResult,
    ForwardResult,
    Loss,
    OptimResult,
    OutputsLoss,
    SessionInfo,
    StateRef,
    reads,
)
from crucible_kitchen.workers import Lane, PendingResult, Submissions, run_sync
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.acting import MlpPolicy
from crucible_kitchen_torch.mlp import MlpModel
from crucible_kitchen_torch.sampling import Limits, TorchSampler
from crucible_kitchen_torch.states import delete_state, write_state
from crucible_kitchen_torch.trainer import Trainer
from crucible_kitchen_torch.turns import Turns

__all__ = ["TorchSession"]

R = TypeVar("R")
S = TypeVar("S", TorchSampler, MlpPolicy)


class TorchSession:
    """See ``TrainingSession``. Verbs run in the order of submission; sampling runs between their turns."""

    def __init__(
        self,
        trainer: Trainer,
        turns: Turns,
        submissions: Submissions,
        writes: Submissions,
        group: anyio.abc.TaskGroup,
        capabilities: TrainingCapabilities,
    ) -> None:
        self.trainer = trainer
        self.turns = turns
        self._submissions = submissions
        self._writes = writes
        self._group = group
        self._capabilities = capabilities
        self._info = trainer.info
        self._scope: StepScope | None = None
        self.dropped: list[PendingResult[Any]] = []
        self._closed = False
        self._samplers: list[TorchSampler | MlpPolicy] = []

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, trainer: Trainer, lane: Lane, capabilities: TrainingCapabilities
    ) -> AsyncGenerator["TorchSession", None]:
        """Open the session's task groups; leaving ends its calls and closes its samplers."""
        failure: Exception | None = None
        async with Submissions() as submissions, Submissions() as writes, anyio.create_task_group() as group:
            session = cls(trainer, Turns(lane), submissions, writes, group, capabilities)
            try:
                yield session
            except Exception as error:  # noqa: BLE001 - raised below: a task group would wrap it
                failure = error
            finally:
                session._end()
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def _end(self) -> None:
        self._closed = True
        self._drop_open()
        for sampler in self._samplers:
            sampler.close()

    @property
    def info(self) -> SessionInfo:
        """See ``TrainingSession``."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """See ``TrainingSession``."""
        return self.trainer.model.tokenizer

    @property
    def capabilities(self) -> TrainingCapabilities:
        """See ``TrainingSession``."""
        return self._capabilities

    @property
    def position(self) -> int:
        """See ``TrainingSession``."""
        return self.trainer.position

    def step(self, index: int) -> AbstractAsyncContextManager[TrainingStepScope]:
        """See ``TrainingSession``; the index is checked on entering, once earlier calls have ended."""
        return self._step(index)

    @asynccontextmanager
    async def _step(self, index: int) -> AsyncGenerator[TrainingStepScope, None]:
        self._drop_open()
        if self._scope is not None and self._scope.index == index:
            self._scope.release()
        await self._call(_nothing)
        if index != self.position:
            raise BackendUserError(
                f"step {index} cannot be opened: the session is at step {self.position}",
                hint="load the state of that step first",
            )
        scope = self._scope = StepScope(self, index)
        try:
            yield scope
        finally:
            if not scope.applied:
                scope.drop()

    def _drop_open(self) -> None:
        if self._scope is not None and not self._scope.applied:
            self._scope.drop()

    async def submit(self, call: Callable[[], Awaitable[R]]) -> PendingResult[R]:
        """Submit a call behind all others, once those of dropped steps have ended: their failures concern nobody."""
        if self._closed:
            raise SessionLost("the session is closed", hint="open a new one and load its last state")
        while self.dropped:
            first = self.dropped[0]
            with suppress(Exception):
                await first
            self.dropped = [call for call in self.dropped if call is not first]
        self._writes.check()
        return self._submissions.submit(call)

    async def _call(self, call: Callable[[], Awaitable[R]]) -> R:
        return await (await self.submit(call))

    async def forward(
        self,
        datums: Sequence[Datum],
        *,
        outputs: Collection[str] = ("logprobs",),
        top: int = 0,
        reference: bool = False,
    ) -> PendingResult[ForwardResult]:
        """See ``TrainingSession``."""
        require_outputs(self._capabilities, outputs)
        if reference and not self._capabilities.reference:
            raise CapabilityError("this session keeps no reference", hint="open it with reference=True")
        call, names = tuple(datums), frozenset(outputs)

        def work() -> Iterator[ForwardResult | None]:
            return self.trainer.outputs(call, names, top, self.trainer.weights.reference() if reference else None)

        return await self.submit(lambda: self.turns.all(work))

    async def save_state(self, name: str) -> PendingResult[StateRef]:
        """See ``TrainingSession``; the copy is a turn of the lane, the file is written beside what follows."""
        copied = await self.submit(lambda: self.turns.one(self.trainer.copy_state))

        async def write() -> StateRef:
            tensors, facts = await copied
            return await run_sync(write_state, self.trainer.directory, name, tensors, facts)

        return self._writes.submit(write)

    async def load_state(self, state: StateRef) -> None:
        """See ``TrainingSession``."""
        self._drop_open()
        await self._call(lambda: self.turns.one(self.trainer.load, state))

    async def load_weights(self, state: StateRef) -> None:
        """See ``TrainingSession``."""
        self._drop_open()
        await self._call(lambda: self.turns.one(self.trainer.load_weights, state))

    async def delete_state(self, state: StateRef) -> None:
        """See ``TrainingSession``."""
        await run_sync(delete_state, self.trainer.directory, state)

    async def sampler(self) -> TorchSampler:
        """See ``TrainingSession``."""
        if self.trainer.model.facts.observation_size:
            raise CapabilityError("this model takes observations, not tokens", hint="use session.policy()")
        snapshot = await self._call(lambda: self.turns.one(self.trainer.snapshot))
        options = self.trainer.options
        limits = Limits(options.sampling_rows, options.sampling_cache_tokens)
        return self._held(TorchSampler(self.trainer, snapshot, self.turns, self._group, limits))

    async def policy(self) -> Policy:
        """See ``TrainingSession``."""
        model, value = self.trainer.model, self.trainer.value
        if not isinstance(model, MlpModel):
            raise CapabilityError("this model takes tokens, not observations", hint="use session.sampler()")

        def copied() -> MlpPolicy:
            return MlpPolicy(model.copied(value), self.trainer.position)

        return self._held(await self._call(lambda: self.turns.one(copied)))

    def _held(self, snapshot: S) -> S:
        """Remember a snapshot, to be closed with the session."""
        self._samplers = [s for s in self._samplers if not s.closed]
        self._samplers.append(snapshot)
        return snapshot

    async def export(self, directory: str) -> ExportedModel:
        """See ``TrainingSession``."""
        return await self._call(lambda: self.turns.one(self.trainer.export, directory))


class StepScope:
    """See ``TrainingStepScope``."""

    def __init__(self, session: TorchSession, index: int) -> None:
        self._session = session
        self._accumulation = Accumulation()
        self._calls: list[PendingResult[Any]] = []
        self._failure: Exception | None = None
        self._dropped = False
        self.applied = False
        self.index = index

    def drop(self) -> None:
        """Give up what was accumulated; calls that are under way end at their next turn."""
        self._dropped = True
        self._accumulation = Accumulation()
        self.release()

    def release(self) -> None:
        """Let nobody fail for calls of this step that were not awaited."""
        self._session.dropped += self._calls
        self._calls = []

    async def forward_backward(
        self, datums: Sequence[Datum], loss: str | Loss | OutputsLoss = "cross_entropy", *, order: int | None = None
    ) -> PendingResult[ForwardBackwardResult]:
        """See ``TrainingStepScope``."""
        self._check()
        require_outputs(self._session.capabilities, reads(loss))
        if isinstance(loss, str) and loss not in self._session.capabilities.losses:
            raise CapabilityError(f"there is no built-in loss {loss!r}", hint="use cross_entropy or give a Loss object")
        return await self._submit(lambda: self._gradient(tuple(datums), loss, order))

    async def _gradient(
        self, datums: Sequence[Datum], loss: str | Loss | OutputsLoss, order: int | None
    ) -> ForwardBackwardResult:
        trainer = self._session.trainer
        into = self._accumulation
        try:
            return await self._session.turns.all(lambda: trainer.gradient(datums, loss, into, order), self._check_kept)
        except Exception as error:
            self._failure = error
            raise

    async def apply(self, params: AdamParams, *, scale: float = 1.0) -> PendingResult[OptimResult]:
        """See ``TrainingStepScope``."""
        self._check()
        self.applied = True
        return await self._submit(lambda: self._apply(params, scale))

    async def _apply(self, params: AdamParams, scale: float) -> OptimResult:
        """Take the step, unless a part of its gradient is missing."""
        self._check_kept()
        if self._failure is not None:
            raise self._failure
        accumulated, self._accumulation = self._accumulation, Accumulation()
        return await self._session.turns.one(self._session.trainer.apply, accumulated, params, scale)

    async def _submit(self, call: Callable[[], Awaitable[R]]) -> PendingResult[R]:
        pending = await self._session.submit(call)
        self._calls.append(pending)
        return pending

    def _check(self) -> None:
        if self.applied or self._dropped:
            raise BackendUserError(f"step {self.index} is over", hint="open the next step with session.step()")

    def _check_kept(self) -> None:
        if self._dropped:
            raise BackendUserError(f"step {self.index} was left before this call ended")


async def _nothing() -> None:
    """Return once all calls before this one have ended."""
