"""An evaluator that forgives nothing: an answer is right if every character is.

Knows no model. Read next: ``crucible_kitchen.ports.evaluator``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Literal

from crucible_kitchen.errors import EmptyDataset
from crucible_kitchen.ports import EvalExample, EvalReport, Predictor
from crucible_kitchen.types import JsonObject


class StrictEvaluator:
    """Accuracy by exact match, spaces and case included.

    Args:
        mistakes: how many wrongly answered examples a report names, at most 20.
    """

    synthetic = False

    def __init__(self, *, mistakes: int = 20) -> None:
        self._mistakes = min(int(mistakes), 20)

    async def evaluate(
        self,
        predict: Predictor,
        examples: Sequence[EvalExample],
        *,
        average: Literal["macro", "micro", "weighted"] = "macro",
        seed: int = 0,
    ) -> EvalReport:
        """Count exact matches."""
        if not examples:
            raise EmptyDataset("there are no examples to evaluate")
        answers = await predict(examples)
        wrong = [e.key for e, a in zip(examples, answers, strict=True) if a.text != e.reference]
        accuracy = 1 - len(wrong) / len(examples)
        metrics = {"accuracy": accuracy, "exact_match": accuracy}
        return EvalReport(metrics, {}, len(examples), average, tuple(wrong[: self._mistakes]))

    async def render(self, report: EvalReport, format: Literal["markdown", "json", "html"]) -> str:
        """Return the report as a document."""
        if format == "json":
            return json.dumps(asdict(report), sort_keys=True)
        line = escape(f"accuracy {report.metrics['accuracy']:.4f} of {report.n}")
        return f"<p>{line}</p>" if format == "html" else f"- {line}\n"

    def public_options(self) -> JsonObject:
        """Return all options."""
        return {"mistakes": self._mistakes}

    async def aclose(self) -> None:
        """Nothing is held."""
