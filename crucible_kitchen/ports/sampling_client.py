"""Port ``sampling_client``: samples and log-probabilities from a model."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.types import Acted, Array, JsonObject, Sampled, SamplingParams

__all__ = ["Policy", "Sampler", "SamplingClient"]


class Sampler(Protocol):
    """A model that draws tokens.

    Guarantees: calls may run concurrently; each request draws from its own generator, so that the same seed gives the
    same samples whatever else runs (to the last bit where the backend says so); the weights never change under a
    sampler: ``version`` says which optimizer step they are from. Cancelling a call frees its slot.

    With ``mode="deterministic"`` a request's bits are the same whatever else runs on the same machine with the same
    settings. What a request asks for beyond tokens, text and ``logprobs`` (``mode``, ``raw_logprobs``,
    ``top_logprobs``, ``prompt_logprobs``, ``rescore``) is given exactly or refused, never left out.
    """

    @property
    def version(self) -> int:
        """Optimizer steps behind these weights."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        ...

    async def sample(self, prompt: Sequence[int], params: SamplingParams, n: int = 1) -> list[Sampled]:
        """Draw ``n`` continuations of one prompt, in order.

        Raises:
            BackendUserError: the prompt is empty or longer than the context, or ``max_tokens`` is below 1; or
                ``rescore`` is asked for with a processed distribution.
            CapabilityError: the backend cannot give what is asked for.
        """
        ...

    async def compute_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Array]:
        """Return, per sequence of T + 1 tokens, float32 [T]: log-probability of each token given those before it."""
        ...

    async def score(self, sequences: Sequence[Sequence[int]]) -> Array:
        """Return float32 [N]: what the value head says at the last token of each sequence, a reward model's score.

        Raises:
            CapabilityError: the model has no value head.
        """
        ...

    async def aclose(self) -> None:
        """Release the sampler. Idempotent."""
        ...


class Policy(Protocol):
    """A policy over observations, a snapshot of an ``mlp`` session's weights; the counterpart of ``Sampler``.

    A group of environments that step together is one batch: one call per step. The weights never change under it.
    """

    @property
    def version(self) -> int:
        """Optimizer steps behind these weights."""
        ...

    async def act(self, observations: Array, uniforms: Array | None = None) -> Acted:
        """Choose an action for each observation.

        Args:
            observations: float [G, D].
            uniforms: float [G] in [0, 1), the caller's random numbers: row g takes the first action whose cumulative
                probability exceeds ``uniforms[g]``, so that equal numbers give equal actions. None takes the likeliest.

        Raises:
            BackendUserError: another shape, or an observation that is not finite.
        """
        ...

    async def values(self, observations: Array) -> Array:
        """Return float32 [G]: the value of each observation.

        Raises:
            CapabilityError: the session has no value head.
            BackendUserError: see ``act``.
        """
        ...

    async def aclose(self) -> None:
        """Release the policy. Idempotent."""
        ...


@runtime_checkable
class SamplingClient(Protocol):
    """A backend that serves models for sampling only: teachers, judges' policies, models in production."""

    @property
    def synthetic(self) -> bool:
        """See ``Adapter``."""
        ...

    def open_sampler(self, model: str) -> AbstractAsyncContextManager[Sampler]:
        """Open a sampler of a model by the backend's name for it.

        Raises:
            ModelNotFound: on entering, the backend has no such model.
        """
        ...

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        ...

    async def aclose(self) -> None:
        """See ``Adapter``."""
        ...
