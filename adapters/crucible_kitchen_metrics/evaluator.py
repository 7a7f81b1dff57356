"""The evaluator ``metrics``: asks the model for every example and counts.

It knows the evaluator port; the formulas are in ``crucible_kitchen_metrics.classification``, the documents in
``.report``. Read next: ``crucible_kitchen.ports.evaluator``.
"""

from collections.abc import Sequence
from typing import Literal

import anyio

from crucible_kitchen.errors import BackendError, ConfigError, EmptyDataset
from crucible_kitchen.ports import EvalExample, EvalReport, Prediction, Predictor
from crucible_kitchen.types import JsonObject
from crucible_kitchen.workers import run_sync

__all__ = ["MetricsEvaluator", "normalise"]

Average = Literal["macro", "micro", "weighted"]

MOST_MISTAKES = 20


def normalise(text: str) -> str:
    """Return a text as it is compared: without white space at its ends; case and inner white space count."""
    return text.strip()


class MetricsEvaluator:
    """Accuracy, precision, recall, F1 and exact match of a model's answers, with 95 % bootstrap intervals.

    An answer is right when it equals the reference after :func:`normalise`; ``exact_match`` is ``accuracy`` under the
    name that generation goes by. The other metrics treat every distinct text, reference or answer, as a label.

    Args:
        chunk: examples asked for in one call of the model.
        concurrency: calls at a time.
        resamples: of the bootstrap.
    """

    synthetic = False

    def __init__(self, *, chunk: int = 64, concurrency: int = 4, resamples: int = 1000) -> None:
        if min(chunk, concurrency, resamples) < 1:
            raise ConfigError("evaluator.metrics: chunk, concurrency and resamples must be 1 or more")
        self._chunk = chunk
        self._concurrency = concurrency
        self._resamples = resamples

    async def evaluate(
        self,
        predict: Predictor,
        examples: Sequence[EvalExample],
        *,
        average: Average = "macro",
        seed: int = 0,
    ) -> EvalReport:
        """See ``Evaluator.evaluate``.

        Raises:
            EmptyDataset: there are no examples.
            BackendError: the model did not answer what it was asked.
        """
        if not examples:
            raise EmptyDataset("there are no examples to evaluate on", hint="set eval_split or holdout")
        predictions = await self._ask(predict, examples)
        return await run_sync(_report, examples, predictions, average, seed, self._resamples)

    async def render(self, report: EvalReport, format: Literal["markdown", "json", "html"]) -> str:
        """See ``Evaluator.render``."""
        from crucible_kitchen_metrics.report import render_html, render_json, render_markdown

        renderers = {"markdown": render_markdown, "json": render_json, "html": render_html}
        if format not in renderers:
            raise ConfigError(f"there is no report format {format!r}", hint=f"formats: {', '.join(renderers)}")
        return await run_sync(renderers[format], report)

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        return {"chunk": self._chunk, "concurrency": self._concurrency, "resamples": self._resamples}

    async def aclose(self) -> None:
        """See ``Adapter``; there is nothing to release."""

    async def _ask(self, predict: Predictor, examples: Sequence[EvalExample]) -> list[Prediction]:
        """Return the answers in the examples' order; the first call that fails ends the others."""
        chunks = [examples[i : i + self._chunk] for i in range(0, len(examples), self._chunk)]
        answers: list[list[Prediction]] = [[] for _ in chunks]
        waiting = iter(range(len(chunks)))
        failures: list[Exception] = []

        async def worker(scope: anyio.CancelScope) -> None:
            for i in waiting:  # one iterator for all workers: each chunk is taken once
                try:
                    answers[i] = await predict(chunks[i])
                    _check_answers(chunks[i], answers[i])
                except Exception as error:  # noqa: BLE001 - raised below, without the task group's wrapping
                    failures.append(error)
                    scope.cancel()
                    return

        async with anyio.create_task_group() as group:
            for _ in range(min(self._concurrency, len(chunks))):
                group.start_soon(worker, group.cancel_scope)
        if failures:
            raise failures[0]
        return [prediction for chunk in answers for prediction in chunk]


def _check_answers(examples: Sequence[EvalExample], answers: Sequence[Prediction]) -> None:
    if [answer.key for answer in answers] != [example.key for example in examples]:
        raise BackendError(
            f"asked for {len(examples)} examples, the model gave {len(answers)} answers, or answers to others"
        )


def _report(
    examples: Sequence[EvalExample], predictions: Sequence[Prediction], average: Average, seed: int, resamples: int
) -> EvalReport:
    """Compute the report; numpy is imported here, in the worker, not when the adapter is built."""
    from crucible_kitchen_metrics.classification import bootstrap_intervals, classification_metrics, label_ids

    references = [normalise(example.reference) for example in examples]
    answers = [normalise(prediction.text) for prediction in predictions]
    true, predicted, labels = label_ids(references, answers)
    metrics = classification_metrics(true, predicted, labels)
    intervals = bootstrap_intervals(true, predicted, labels, seed=seed, resamples=resamples)
    names = {name: f"{name}_{average}" for name in ("precision", "recall", "f1")} | {"exact_match": "accuracy"}
    wrong = [e.key for e, reference, answer in zip(examples, references, answers, strict=True) if reference != answer]
    return EvalReport(
        metrics=metrics | {short: metrics[name] for short, name in names.items()},
        intervals=intervals | {short: intervals[name] for short, name in names.items()},
        n=len(examples),
        average=average,
        mistakes=tuple(wrong[:MOST_MISTAKES]),
    )
