"""What the checks of training clients are made of: a case, data, one step, one look at the weights.

Knows no adapter. Read next: ``crucible_kitchen.testing.contracts.training_client``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.ports import Pending, TrainingClient, TrainingSession
from crucible_kitchen.testing.contracts.base import Suite, close, same_bits
from crucible_kitchen.types import (
    AdamParams,
    Array,
    Datum,
    Float64Array,
    LoraSpec,
    Loss,
    LossValue,
    OptimResult,
    OutputsLoss,
    SessionSpec,
    StateRef,
)

__all__ = ["TRAINING_CLIENT", "StatedCrossEntropy", "TrainingClientCase", "batch", "datum", "look", "saved", "train"]


@dataclass(frozen=True)
class TrainingClientCase:
    """A training client under test.

    Attributes:
        client: the adapter.
        model: a model that it trains.
        directory: an empty directory of the test's own.
        lora: what to train; None: all weights.
        tolerance: how far log-probabilities may differ that are equal up to rounding.
        learning_rate: of the steps that the checks make, with an epsilon of 1.
        unknown_model: a name that does not exist, if there is one.
        tamper: changes the stored bytes of a state behind the client's back, where that is possible.
    """

    client: TrainingClient
    model: str
    directory: Path
    lora: LoraSpec | None = None
    tolerance: float = 1e-9
    learning_rate: float = 0.5
    unknown_model: str = ""
    tamper: Callable[[StateRef], None] | None = None

    @property
    def adapter(self) -> TrainingClient:
        """The client."""
        return self.client

    def session(
        self, seed: int = 1, *, value_head: bool = False, reference: bool = False
    ) -> AbstractAsyncContextManager[TrainingSession]:
        """Open a session; sessions of one seed are equal."""
        spec = SessionSpec(
            self.model,
            self.lora,
            seed,
            str(self.directory / "states"),
            run_id="contract",
            value_head=value_head,
            reference=reference,
        )
        return self.client.open_session(spec)

    def optimizer(self, **changes: float) -> AdamParams:
        """Return AdamW whose update grows with the gradient (a large epsilon), so that its scale is seen."""
        return AdamParams(**({"learning_rate": self.learning_rate, "eps": 1.0} | changes))

    def equal(self, one: Sequence[Array], other: Sequence[Array], what: str) -> None:
        """Assert equality: to the last bit where the client says that it is reproducible."""
        if self.client.capabilities.reproducible:
            same_bits(one, other, what)
        else:
            close(one, other, self.tolerance, what)

    def near(self, one: Sequence[Array], other: Sequence[Array], what: str) -> None:
        """Assert equality up to rounding."""
        close(one, other, self.tolerance, what)

    def moved(self, before: Sequence[Array], after: Sequence[Array]) -> None:
        """Assert that the weights changed by far more than the tolerance, so that equality says something."""
        change = max(float(np.max(np.abs(a - b))) for a, b in zip(before, after, strict=True))
        assert change > 20 * self.tolerance, f"a step changed log-probabilities by {change} only; raise learning_rate"


TRAINING_CLIENT: Suite[TrainingClientCase] = Suite("training_client")


def datum(session: TrainingSession, number: int, *, length: int = 6, weight: float = 1.0) -> Datum:
    """Return the datum of a number: ``length`` positions, the first without weight."""
    vocab = min(session.info.vocab_size, 64)
    tokens = [(5 * number + (number + 3) * place) % vocab for place in range(length + 1)]
    return Datum.from_tokens(tokens, [0.0, 0.0, *[weight] * (length - 1)], key=f"row-{number}")


def batch(session: TrainingSession, size: int = 4, *, weight: float = 1.0) -> list[Datum]:
    """Return datums of different lengths."""
    return [datum(session, number, length=4 + number, weight=weight) for number in range(size)]


async def train(
    session: TrainingSession,
    calls: Sequence[Sequence[Datum]],
    params: AdamParams,
    *,
    loss: str | Loss | OutputsLoss = "cross_entropy",
    scale: float = 1.0,
) -> OptimResult:
    """Make one optimizer step of the calls' sum."""
    async with session.step(session.position) as step:
        pending = [await step.forward_backward(datums, loss) for datums in calls]
        applied = await step.apply(params, scale=scale)
        failures = [failure for each in (*pending, applied) if (failure := await _failure(each))]
        if failures:
            raise failures[0]
        return await applied


async def _failure(pending: Pending[object]) -> CrucibleError | None:
    """Wait for a call and return how it failed, so that no failure is left that nobody awaited."""
    try:
        await pending
    except CrucibleError as error:
        return error
    return None


async def look(session: TrainingSession) -> list[Array]:
    """Return log-probabilities of fixed datums: what can be seen of the weights."""
    result = await (await session.forward([datum(session, number) for number in range(6)]))
    return [np.asarray(logprobs) for logprobs in result.logprobs]


async def saved(session: TrainingSession, name: str) -> StateRef:
    """Save a state and wait until it is written."""
    return await (await session.save_state(name))


class StatedCrossEntropy:
    """Cross entropy, stated as a custom loss."""

    name = "stated_cross_entropy"
    group = 1

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        """Evaluate one datum."""
        weights = loss_inputs[0]["weights"].astype(np.float64)
        return LossValue(-float(np.sum(weights * logprobs[0])), [-weights], {"rows": 1.0})
