"""The contract of port ``evaluator``: counted, not made up; absent rather than zero.

Knows no adapter. Read next: ``crucible_kitchen.ports.evaluator``.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from crucible_kitchen.errors import EmptyDataset, TransientBackendError
from crucible_kitchen.ports import EvalExample, Evaluator, Prediction
from crucible_kitchen.testing.contracts.base import Suite, refuses

__all__ = ["EVALUATOR", "EvaluatorCase"]

Average = Literal["macro", "micro", "weighted"]


@dataclass(frozen=True)
class EvaluatorCase:
    """An evaluator under test."""

    evaluator: Evaluator

    @property
    def adapter(self) -> Evaluator:
        """The evaluator."""
        return self.evaluator


EVALUATOR: Suite[EvaluatorCase] = Suite("evaluator")

_TRUTH = ("a", "a", "a", "b")
_SAID = ("a", "a", "b", "b")
_EXPECTED: dict[Average, dict[str, float]] = {
    "macro": {"precision": 0.75, "recall": 5 / 6, "f1": 11 / 15},
    "micro": {"precision": 0.75, "recall": 0.75, "f1": 0.75},
    "weighted": {"precision": 0.875, "recall": 0.75, "f1": 23 / 30},
}


def _examples(references: Sequence[str]) -> list[EvalExample]:
    return [EvalExample(f"k{i}", (1, 2, i), reference) for i, reference in enumerate(references)]


class _Says:
    """A predictor that answers by key and remembers what it was asked."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def __call__(self, examples: Sequence[EvalExample]) -> list[Prediction]:
        self.asked += [example.key for example in examples]
        return [Prediction(example.key, self.answer(example.key)) for example in examples]


def _saying(texts: Sequence[str]) -> _Says:
    return _Says(lambda key: texts[int(key[1:])])


@EVALUATOR
async def every_example_is_asked_once(case: EvaluatorCase) -> None:
    """The model is really called, for each example."""
    predict = _saying(["a"] * 50)
    report = await case.evaluator.evaluate(predict, _examples(["a"] * 50))
    assert sorted(predict.asked) == sorted(f"k{i}" for i in range(50)), "not every example was asked once"
    assert report.n == 50, f"n is {report.n}"


@EVALUATOR
async def right_answers_score_one_and_wrong_ones_zero(case: EvaluatorCase) -> None:
    """Accuracy at its ends."""
    for said, expected in ((_TRUTH, 1.0), (("x", "y", "z", "w"), 0.0)):
        report = await case.evaluator.evaluate(_saying(said), _examples(_TRUTH))
        assert report.metrics["accuracy"] == expected, f"accuracy {report.metrics['accuracy']} for {said}"


@EVALUATOR
async def metrics_are_computed_from_the_predictions(case: EvaluatorCase) -> None:
    """Accuracy always; the averages where they are given: a metric that is not computed is absent, never zero."""
    for average, numbers in _EXPECTED.items():
        report = await case.evaluator.evaluate(_saying(_SAID), _examples(_TRUTH), average=average)
        assert report.average == average, f"average {report.average}"
        assert math.isclose(report.metrics["accuracy"], 0.75), f"accuracy {report.metrics['accuracy']}"
        for name, value in numbers.items():
            for key in (name, f"{name}_{average}"):
                found = report.metrics.get(key, value)
                assert math.isclose(found, value, abs_tol=1e-12), f"{key} is {found}, not {value} ({average})"


@EVALUATOR
async def the_same_predictions_give_the_same_report(case: EvaluatorCase) -> None:
    """To the last digit, intervals included."""
    truth, said = _TRUTH * 10, _SAID * 10
    reports = [await case.evaluator.evaluate(_saying(said), _examples(truth), seed=3) for _ in range(2)]
    assert asdict(reports[0]) == asdict(reports[1]), "two reports of the same predictions differ"


@EVALUATOR
async def an_interval_holds_its_metric(case: EvaluatorCase) -> None:
    """Low is not above high, and what was measured lies in between."""
    report = await case.evaluator.evaluate(_saying(_SAID * 10), _examples(_TRUTH * 10))
    for name, (low, high) in report.intervals.items():
        value = report.metrics[name]
        assert low - 1e-12 <= value <= high + 1e-12, f"{name} {value} is outside of ({low}, {high})"


@EVALUATOR
async def mistakes_are_named(case: EvaluatorCase) -> None:
    """By their keys, at most twenty."""
    report = await case.evaluator.evaluate(_saying(_SAID), _examples(_TRUTH))
    assert list(report.mistakes) == ["k2"], f"mistakes {report.mistakes}"
    many = await case.evaluator.evaluate(_saying(["x"] * 50), _examples(["a"] * 50))
    assert 0 < len(many.mistakes) <= 20, f"{len(many.mistakes)} mistakes are listed"


@EVALUATOR
async def no_examples_are_refused(case: EvaluatorCase) -> None:
    """There is no accuracy of nothing."""
    with refuses(EmptyDataset, what="evaluating no examples"):
        await case.evaluator.evaluate(_saying([]), [])


@EVALUATOR
async def a_failing_model_fails_the_evaluation(case: EvaluatorCase) -> None:
    """With the model's own error; a fault is never a score."""

    async def predict(examples: Sequence[EvalExample]) -> list[Prediction]:  # noqa: ARG001 - a ``Predictor``
        raise TransientBackendError("the model is gone")

    with refuses(TransientBackendError, what="evaluating a model that fails"):
        await case.evaluator.evaluate(predict, _examples(_TRUTH))


@EVALUATOR
async def a_report_is_marked_synthetic_if_the_evaluator_is(case: EvaluatorCase) -> None:
    """So that nobody promotes on it."""
    report = await case.evaluator.evaluate(_saying(_SAID), _examples(_TRUTH))
    assert report.synthetic == case.evaluator.synthetic, f"synthetic is {report.synthetic}"


@EVALUATOR
async def a_report_can_be_read_in_three_formats(case: EvaluatorCase) -> None:
    """Markdown, JSON, HTML; each says n and the accuracy, and model output is escaped."""
    examples = [EvalExample("<script>alert(1)</script>", (1,), "a"), *_examples(_TRUTH)]
    predict = _Says(lambda key: "<img src=x onerror=alert(2)>" if key.startswith("<") else "a")
    report = await case.evaluator.evaluate(predict, examples)
    parsed = json.loads(await case.evaluator.render(report, "json"))
    assert parsed["metrics"]["accuracy"] == report.metrics["accuracy"], "the JSON has another accuracy"
    html = await case.evaluator.render(report, "html")
    markdown = await case.evaluator.render(report, "markdown")
    for text in (html, markdown):
        assert "accuracy" in text, "the document does not name the accuracy"
        assert "<script" not in text, "model output is not escaped"
        assert "<img" not in text, "model output is not escaped"
