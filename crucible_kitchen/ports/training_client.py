"""Port ``training_client``: sessions that train a model one optimizer step at a time."""

from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

from crucible_kitchen.ports.sampling_client import Sampler
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.types import (
    AdamParams,
    Datum,
    ExportedModel,
    ForwardBackwardResult,
    ForwardResult,
    JsonObject,
    Loss,
    OptimResult,
    SessionInfo,
    SessionSpec,
    StateRef,
)

__all__ = ["Pending", "TrainingCapabilities", "TrainingClient", "TrainingSession", "TrainingStepScope"]

T_co = TypeVar("T_co", covariant=True)


class Pending(Awaitable[T_co], Protocol[T_co]):
    """A submitted call: awaiting it gives the result, any number of times.

    It belongs to its session's task group: it runs whether awaited or not, is cancelled with the session, and a
    failure that nobody awaited fails the session's next call.
    """


@dataclass(frozen=True, slots=True)
class TrainingCapabilities:
    """What a training backend can do; part of the manifest, read by the checks before a run.

    Attributes:
        step_scale: how ``optim_step(scale=)`` is kept. ``exact``: any number, known only at the step. ``constant``:
            one number for the whole run. ``none``: weights must be scaled before submission.
        losses: names of the built-in losses.
        custom_loss: a ``Loss`` object is ``honoured`` (one pass), ``emulated`` (two passes) or ``refused``.
        recovery: ``step_token`` (applies index k only at k), ``rollback`` (resume reloads a state) or ``none``.
        ordered_accumulation: gradients are added in the order of ``order``, whatever the order of arrival.
        lora, full_weights: which trainings are possible.
        sampling, export: whether ``sampler()`` and ``export()`` work.
        entropy, value_head, topk_logprobs, full_logits: what losses beyond sampled log-probabilities can use.
        reproducible: equal seeds give equal bits.
        synthetic: numbers are made up.
    """

    step_scale: Literal["exact", "constant", "none"]
    losses: frozenset[str]
    custom_loss: Literal["honoured", "emulated", "refused"]
    recovery: Literal["step_token", "rollback", "none"]
    ordered_accumulation: bool = False
    lora: bool = True
    full_weights: bool = False
    sampling: bool = True
    export: bool = True
    entropy: bool = False
    value_head: bool = False
    topk_logprobs: bool = False
    full_logits: bool = False
    reproducible: bool = False
    synthetic: bool = False


class TrainingStepScope(Protocol):
    """The opened accumulation of one optimizer step; ``async with session.step(k)`` gives it."""

    @property
    def index(self) -> int:
        """Which step this is: k is applied when ``session.position`` is k."""
        ...

    async def forward_backward(
        self, datums: Sequence[Datum], loss: str | Loss = "cross_entropy", *, order: int | None = None
    ) -> Pending[ForwardBackwardResult]:
        """Add the gradient of the *sum* of the loss over ``datums`` to this step's accumulation.

        Returns once accepted; submissions run in order. ``order`` (capability ``ordered_accumulation``) fixes the
        place of this gradient in the sum whatever the order of arrival.

        Raises:
            CapabilityError: the backend has no such loss and cannot emulate it.
            BackendUserError: a datum lacks an input of the loss, or has a token outside the vocabulary.
        """
        ...

    async def apply(self, params: AdamParams, *, scale: float = 1.0) -> Pending[OptimResult]:
        """Multiply the accumulated gradient by ``scale``, clip, update, and move to step k + 1.

        A backend with step tokens that already applied k returns the stored answer. If the result is not finite, the
        weights are left as they were and ``NonFiniteLoss`` is raised when awaited.
        """
        ...


class TrainingSession(Protocol):
    """One model being trained.

    Guarantees: reductions are sums, positions are those of ``Datum``; results do not depend on how a batch is split
    into calls, micro-batches or padding, up to rounding; a cancelled call leaves the session usable; nothing is left
    running when the session's block ends.
    """

    @property
    def info(self) -> SessionInfo:
        """Facts about the model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        ...

    @property
    def capabilities(self) -> TrainingCapabilities:
        """What this session can do (the client's, narrowed by the model)."""
        ...

    @property
    def position(self) -> int:
        """Optimizer steps applied so far."""
        ...

    def step(self, index: int) -> AbstractAsyncContextManager[TrainingStepScope]:
        """Open accumulation ``index``; whatever an earlier try of this step left is dropped.

        Leaving the block without ``apply`` drops the gradient; a step is retried by opening it again.

        Raises:
            BackendUserError: ``index`` is not ``position``, and (step token) not ``position - 1``.
        """
        ...

    async def forward(self, datums: Sequence[Datum]) -> Pending[ForwardResult]:
        """Compute target log-probabilities without gradient."""
        ...

    async def save_state(self, name: str) -> Pending[StateRef]:
        """Save weights, optimizer and RNG under a name, atomically; overwrites a state of the same name.

        Returns once accepted. What is saved is the state at this place in the order of calls: later steps neither
        change it nor wait for it to be written. The state is on the disk when it has been awaited.

        Raises:
            StorageFull: when awaited: the disk is full; earlier states are untouched.
        """
        ...

    async def load_state(self, state: StateRef) -> None:
        """Restore a saved state bit for bit; ``position`` becomes the state's step.

        Raises:
            IntegrityError: the stored bytes do not match their hash; the session is unchanged.
        """
        ...

    async def delete_state(self, state: StateRef) -> None:
        """Free what a saved state takes; it cannot be loaded any more. One that is gone already is no error."""
        ...

    async def sampler(self) -> Sampler:
        """Return a sampler of the weights as they are now; later steps do not change it. Closed with the session."""
        ...

    async def export(self, directory: str) -> ExportedModel:
        """Write the model for use elsewhere into a directory that exists and is empty."""
        ...


@runtime_checkable
class TrainingClient(Protocol):
    """A backend that trains."""

    @property
    def capabilities(self) -> TrainingCapabilities:
        """What the backend can do; no call is made to find out."""
        ...

    @property
    def synthetic(self) -> bool:
        """See ``Adapter``."""
        ...

    def open_session(self, spec: SessionSpec) -> AbstractAsyncContextManager[TrainingSession]:
        """Open a session; leaving the block ends all its calls and frees what it holds.

        Raises:
            ModelNotFound: on entering, there is no such model.
            CapabilityError: on entering, the spec asks for what the backend or the model cannot do.
        """
        ...

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        ...

    async def aclose(self) -> None:
        """See ``Adapter``."""
        ...
