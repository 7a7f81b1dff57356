"""Port ``training_client``: sessions that train a model one optimizer step at a time."""

from collections.abc import Awaitable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.ports.sampling_client import Policy, Sampler
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
    OutputsLoss,
    SessionInfo,
    SessionSpec,
    StateRef,
)

__all__ = [
    "Pending",
    "TrainingCapabilities",
    "TrainingClient",
    "TrainingSession",
    "TrainingStepScope",
    "needed_inputs",
    "require_outputs",
]

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
        session_options: sessions keep LoRA's ``dropout`` and ``targets`` and a ``chat_template``.
        sampling, export: whether ``sampler()`` and ``export()`` work.
        sampling_options: samplers keep ``mode``, ``raw_logprobs``, ``top_logprobs`` and ``rescore``.
        entropy, value_head, topk_logprobs, full_logits: what losses beyond sampled log-probabilities can use, see
            ``Output``. A session has ``value_head`` only if it was opened with one.
        reference: ``forward(reference=True)`` works in sessions opened with ``reference``.
        mlp: the model ``mlp``, a policy over observations, can be trained, and ``policy()`` gives it.
        shared_prefix: consecutive datums that begin with the same tokens are computed once up to where they part.
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
    session_options: bool = True
    sampling: bool = True
    sampling_options: bool = True
    export: bool = True
    entropy: bool = False
    value_head: bool = False
    topk_logprobs: bool = False
    full_logits: bool = False
    reference: bool = False
    mlp: bool = False
    shared_prefix: bool = False
    reproducible: bool = False
    synthetic: bool = False


_LACKS: dict[str, tuple[str, str, str]] = {
    "values": (
        "value_head",
        "has no value head",
        "open the session with value_head=True; without one use advantage=grpo, dr_grpo, rloo or centred",
    ),
    "entropy": (
        "entropy",
        "does not give the entropy of a whole distribution",
        "use the loss's own entropy_coef, which estimates it from the sampled tokens",
    ),
    "top_logprobs": (
        "topk_logprobs",
        "does not give log-probabilities of several tokens per position",
        "distil on-policy, by the teacher's log-probabilities of sampled tokens, or train on the teacher's samples",
    ),
    "logits": (
        "full_logits",
        "does not give the scores of every token",
        "distil on the teacher's top tokens (topk_logprobs), on-policy, or on the teacher's samples",
    ),
}


def require_outputs(capabilities: TrainingCapabilities, outputs: Collection[str]) -> None:
    """Check that a backend, or a session, gives these outputs.

    Raises:
        CapabilityError: it does not give one; the hint names what to use instead.
    """
    for output in outputs:
        lack = _LACKS.get(output)
        if lack is None and output != "logprobs":
            raise CapabilityError(f"no model has the output {output!r}", hint=f"outputs: logprobs, {', '.join(_LACKS)}")
        if lack is not None and not getattr(capabilities, lack[0]):
            raise CapabilityError(f"this backend or session {lack[1]} (output {output!r})", hint=lack[2])


def needed_inputs(outputs: Collection[str]) -> tuple[str, ...]:
    """Return the loss inputs that a backend itself needs to compute outputs for a loss."""
    needs = {"logprobs": "target_tokens", "top_logprobs": "teacher_tokens"}
    return tuple(name for output, name in needs.items() if output in outputs)


class TrainingStepScope(Protocol):
    """The opened accumulation of one optimizer step; ``async with session.step(k)`` gives it."""

    @property
    def index(self) -> int:
        """Which step this is: k is applied when ``session.position`` is k."""
        ...

    async def forward_backward(
        self, datums: Sequence[Datum], loss: str | Loss | OutputsLoss = "cross_entropy", *, order: int | None = None
    ) -> Pending[ForwardBackwardResult]:
        """Add the gradient of the *sum* of the loss over ``datums`` to this step's accumulation.

        Returns once accepted; submissions run in order. ``order`` (capability ``ordered_accumulation``) fixes the
        place of this gradient in the sum whatever the order of arrival.

        Raises:
            CapabilityError: the backend has no such loss and cannot emulate it, or lacks an output that it reads.
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
        """The model's tokenizer.

        Raises:
            CapabilityError: the model takes observations.
        """
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

    async def forward(
        self,
        datums: Sequence[Datum],
        *,
        outputs: Collection[str] = ("logprobs",),
        top: int = 0,
        reference: bool = False,
    ) -> Pending[ForwardResult]:
        """Compute outputs of the model without gradient.

        Args:
            datums: what to compute; only ``logprobs`` needs targets.
            outputs: which, see ``crucible_kitchen.types.Output``.
            top: k of ``top_logprobs``, 1 or more where those are asked for.
            reference: under the weights as they were when the session was opened, with ``SessionSpec.reference``.

        Raises:
            CapabilityError: the session does not give one of the outputs, or keeps no reference.
            BackendUserError: see ``TrainingStepScope.forward_backward``; or ``top`` does not fit.
        """
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

    async def load_weights(self, state: StateRef) -> None:
        """Take over the weights of a saved state and nothing else: the optimizer begins anew, ``position`` becomes 0.

        Raises:
            IntegrityError: see :meth:`load_state`.
        """
        ...

    async def delete_state(self, state: StateRef) -> None:
        """Free what a saved state takes; it cannot be loaded any more. One that is gone already is no error."""
        ...

    async def sampler(self) -> Sampler:
        """Return a sampler of the weights as they are now; later steps do not change it. Closed with the session.

        Raises:
            CapabilityError: the backend does not sample, or the model takes observations: see ``policy``.
        """
        ...

    async def policy(self) -> Policy:
        """Return the policy as it is now, of a session on ``mlp``; later steps do not change it.

        Raises:
            CapabilityError: the model takes tokens: see ``sampler``.
        """
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
