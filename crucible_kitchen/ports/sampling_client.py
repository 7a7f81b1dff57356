"""Port ``sampling_client``: samples and log-probabilities from a model."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.types import Array, JsonObject, Sampled, SamplingParams

__all__ = ["Sampler", "SamplingClient"]


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

    async def aclose(self) -> None:
        """Release the sampler. Idempotent."""
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
