"""Port ``evaluator``: metrics over what a model really predicts."""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from crucible_kitchen.types import JsonObject

__all__ = ["EvalExample", "EvalReport", "Evaluator", "Prediction", "Predictor"]


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One held-out question: the model's prompt, the reference, and the labels to choose from (empty: generate)."""

    key: str
    prompt: tuple[int, ...]
    reference: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model answered to one example."""

    key: str
    text: str
    scores: Mapping[str, float] = field(default_factory=dict)


class Predictor(Protocol):
    """The model, as an evaluator sees it."""

    def __call__(self, examples: Sequence[EvalExample]) -> Awaitable[list[Prediction]]:
        """Answer the examples, in their order; may be called concurrently."""
        ...


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What an evaluation found.

    Attributes:
        metrics: value by name: ``accuracy``, ``precision``, ``recall``, ``f1`` (by the average asked for), the same
            with ``_macro``, ``_micro``, ``_weighted``, and ``exact_match``.
        intervals: 95 % bootstrap interval by metric name: (low, high).
        n: number of examples.
        average: which average the short names stand for.
        mistakes: keys of wrongly answered examples, at most 20.
        synthetic: the numbers are made up.
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    n: int
    average: str
    mistakes: tuple[str, ...] = ()
    synthetic: bool = False


@runtime_checkable
class Evaluator(Protocol):
    """A way to measure a model. The same predictions give the same report."""

    @property
    def synthetic(self) -> bool:
        """See ``Adapter``."""
        ...

    async def evaluate(
        self,
        predict: Predictor,
        examples: Sequence[EvalExample],
        *,
        average: Literal["macro", "micro", "weighted"] = "macro",
        seed: int = 0,
    ) -> EvalReport:
        """Ask the model for every example and compute the metrics.

        Raises:
            EmptyDataset: there are no examples.
        """
        ...

    async def render(self, report: EvalReport, format: Literal["markdown", "json", "html"]) -> str:
        """Return the report as a document; model output is escaped."""
        ...

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        ...

    async def aclose(self) -> None:
        """See ``Adapter``."""
        ...
