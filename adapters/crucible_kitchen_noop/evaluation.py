"""An evaluator for tests: exact match and per-class averages, computed from the predictions, marked synthetic.

It has no bootstrap intervals and needs no package. Read next: ``crucible_kitchen.ports.evaluator``.
"""

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from crucible_kitchen.errors import BackendUserError, EmptyDataset
from crucible_kitchen.ports import EvalExample, EvalReport, Prediction, Predictor
from crucible_kitchen.types import JsonObject

__all__ = ["NoopEvaluator"]

_MOST_MISTAKES = 20


class NoopEvaluator:
    """Really asks the model and really counts; the report is marked synthetic so that nobody promotes on it."""

    @property
    def synthetic(self) -> bool:
        """Always."""
        return True

    async def evaluate(
        self,
        predict: Predictor,
        examples: Sequence[EvalExample],
        *,
        average: Literal["macro", "micro", "weighted"] = "macro",
        seed: int = 0,  # noqa: ARG002 - nothing here is drawn
    ) -> EvalReport:
        """See ``Evaluator``."""
        if not examples:
            raise EmptyDataset("there are no examples to evaluate", hint="hold rows out, or name an eval_split")
        predictions = await predict(examples)
        if [p.key for p in predictions] != [e.key for e in examples]:
            raise BackendUserError("the predictions are not one per example, in the examples' order")
        metrics = _metrics(examples, predictions)
        metrics |= {name: metrics[f"{name}_{average}"] for name in ("precision", "recall", "f1")}
        wrong = [e.key for e, p in zip(examples, predictions, strict=True) if not _right(e, p)]
        return EvalReport(metrics, {}, len(examples), average, tuple(wrong[:_MOST_MISTAKES]), synthetic=True)

    async def render(self, report: EvalReport, format: Literal["markdown", "json", "html"]) -> str:
        """Return the report as a document."""
        if format == "json":
            return json.dumps(asdict(report), indent=2, sort_keys=True)
        rows = [(name, f"{value:.4f}") for name, value in sorted(report.metrics.items())]
        if format == "html":
            cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{value}</td></tr>" for name, value in rows)
            return f"<h1>Evaluation (synthetic)</h1><p>n = {report.n}</p><table>{cells}</table>"
        lines = "\n".join(f"| {html.escape(name)} | {value} |" for name, value in rows)
        return f"# Evaluation (synthetic)\n\nn = {report.n}\n\n| metric | value |\n| --- | --- |\n{lines}\n"

    def public_options(self) -> JsonObject:
        """There are no options."""
        return {}

    async def aclose(self) -> None:
        """Nothing is held."""


def _right(example: EvalExample, prediction: Prediction) -> bool:
    return prediction.text.strip() == example.reference.strip()


def _metrics(examples: Sequence[EvalExample], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return accuracy and the three averages; a class nobody predicted has precision 0, as scikit-learn counts."""
    truth = Counter(e.reference.strip() for e in examples)
    said = Counter(p.text.strip() for p in predictions)
    hits = Counter(e.reference.strip() for e, p in zip(examples, predictions, strict=True) if _right(e, p))
    accuracy = hits.total() / len(examples)
    result = {"accuracy": accuracy, "exact_match": accuracy}
    classes = sorted(truth | said)
    per_class = {
        "precision": [hits[c] / said[c] if said[c] else 0.0 for c in classes],
        "recall": [hits[c] / truth[c] if truth[c] else 0.0 for c in classes],
        "f1": [2 * hits[c] / (truth[c] + said[c]) for c in classes],
    }
    for name, values in per_class.items():
        result[f"{name}_macro"] = sum(values) / len(values)
        result[f"{name}_micro"] = accuracy
        result[f"{name}_weighted"] = sum(v * truth[c] for v, c in zip(values, classes, strict=True)) / len(examples)
    return result
