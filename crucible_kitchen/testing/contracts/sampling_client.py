"""The contract of port ``sampling_client``: it opens samplers by name, and they keep theirs.

Knows no adapter. Read next: ``crucible_kitchen.testing.contracts.sampler``.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps

from crucible_kitchen.errors import ModelNotFound
from crucible_kitchen.ports import SamplingClient
from crucible_kitchen.testing.contracts.base import Suite, refuses, skip
from crucible_kitchen.testing.contracts.sampler import SAMPLER_CHECKS, Sampling

__all__ = ["SAMPLING_CLIENT", "SamplingClientCase"]


@dataclass(frozen=True)
class SamplingClientCase:
    """A sampling client under test.

    Attributes:
        client: the adapter.
        model: a model that it serves.
        unknown_model: a name that it does not serve, if there is one.
        tolerance: how far log-probabilities may differ that are computed in two ways.
        context_length: longest sequence, tokens; 0 if it is not known.
    """

    client: SamplingClient
    model: str
    unknown_model: str = ""
    tolerance: float = 1e-3
    context_length: int = 0

    @property
    def adapter(self) -> SamplingClient:
        """The client."""
        return self.client


SAMPLING_CLIENT: Suite[SamplingClientCase] = Suite("sampling_client")


def _opened(check: Callable[[Sampling], Awaitable[None]]) -> Callable[[SamplingClientCase], Awaitable[None]]:
    @wraps(check)
    async def opened(case: SamplingClientCase) -> None:
        async with case.client.open_sampler(case.model) as sampler:
            await check(Sampling(sampler, case.tolerance, case.context_length))

    return opened


for _check in SAMPLER_CHECKS:
    SAMPLING_CLIENT(_opened(_check))


@SAMPLING_CLIENT
async def a_model_that_does_not_exist_is_not_found(case: SamplingClientCase) -> None:
    """On entering."""
    if not case.unknown_model:
        skip("it serves every name")
    with refuses(ModelNotFound, what="opening a model that does not exist"):
        async with case.client.open_sampler(case.unknown_model):
            pass


@SAMPLING_CLIENT
async def an_error_in_the_block_leaves_it_as_it_is(case: SamplingClientCase) -> None:
    """It is not wrapped, not swallowed, and a new sampler can be opened."""
    with refuses(ZeroDivisionError, what="a block that fails"):
        async with case.client.open_sampler(case.model):
            raise ZeroDivisionError
    async with case.client.open_sampler(case.model) as sampler:
        assert sampler.version == 0, "a served model has no optimizer steps behind it"
