"""Classification metrics and their bootstrap intervals, as pure functions of labels.

It knows numpy and no model. Read next: ``crucible_kitchen_metrics.evaluator``.

``n`` examples, ``K`` labels, ``R`` resamples. A label is an integer id; the set of labels is the union of references
and predictions. For label k: ``tp_k`` counts examples with reference = prediction = k, ``predicted_k`` those predicted
as k, ``true_k`` (the support) those whose reference is k.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["METRICS", "bootstrap_intervals", "classification_metrics", "label_ids"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

AVERAGES = ("macro", "micro", "weighted")
METRICS = ("accuracy", *(f"{metric}_{average}" for metric in ("precision", "recall", "f1") for average in AVERAGES))

_CELLS = 2_000_000
"""Most numbers held at a time per array by the bootstrap: 16 MB."""


def label_ids(references: Sequence[str], predictions: Sequence[str]) -> tuple[Ids, Ids, int]:
    """Number the labels of both sequences by one scheme.

    Returns:
        The references' ids [n], the predictions' ids [n], and K.
    """
    ids: dict[str, int] = {}
    pairs = [
        (ids.setdefault(reference, len(ids)), ids.setdefault(prediction, len(ids)))
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1], len(ids)


def classification_metrics(references: Ids, predictions: Ids, labels: int) -> dict[str, float]:
    """Return every metric of ``METRICS`` over one set of examples.

    Formulas (scikit-learn's ``precision_recall_fscore_support`` with ``zero_division=0``; a quotient 0/0 is 0)::

        precision_k = tp_k / predicted_k      recall_k = tp_k / true_k      f1_k = 2 tp_k / (true_k + predicted_k)
        macro       = mean over labels        weighted = sum_k true_k m_k / n
        micro       = the same formulas with sum_k tp_k, sum_k predicted_k, sum_k true_k (all three equal accuracy)
        accuracy    = sum_k tp_k / n

    Args:
        references: ids [n].
        predictions: ids [n].
        labels: K; every id is below it.
    """
    counts = _counts(references[None, :], predictions[None, :], labels)
    return {name: float(values[0]) for name, values in _averages(*counts).items()}


def bootstrap_intervals(
    references: Ids, predictions: Ids, labels: int, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return the percentile bootstrap interval of every metric of ``METRICS`` (Efron & Tibshirani 1993, 13.3).

    ``resamples`` times n examples are drawn with replacement and the metrics computed anew; the interval runs from
    the (1 - level)/2 to the (1 + level)/2 quantile. A label that a resample does not hold takes no part in its macro
    average. Averages over rare labels are biased under resampling, so an interval is widened to hold the metric itself.

    Args:
        references: ids [n].
        predictions: ids [n].
        labels: K.
        seed: of the resampling; the same seed gives the same intervals.
        resamples: R.
        level: the share of resamples inside.
    """
    n = len(references)
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, _CELLS // max(n, labels)))
    parts: list[Mapping[str, Floats]] = []
    for begin in range(0, resamples, rows):
        drawn = rng.integers(0, n, size=(min(rows, resamples - begin), n))
        parts.append(_averages(*_counts(references[drawn], predictions[drawn], labels)))
    whole = classification_metrics(references, predictions, labels)
    intervals = {}
    for name, value in whole.items():
        low, high = np.quantile(np.concatenate([part[name] for part in parts]), [(1 - level) / 2, (1 + level) / 2])
        intervals[name] = (min(float(low), value), max(float(high), value))
    return intervals


def _counts(references: Ids, predictions: Ids, labels: int) -> tuple[Ids, Ids, Ids]:
    """Return tp, predicted and true, each [R, K], of references and predictions [R, n]."""
    rows = references.shape[0]
    offset = np.arange(rows, dtype=np.int64)[:, None] * labels
    right = references == predictions

    def count(ids: Ids) -> Ids:
        return np.bincount(ids, minlength=rows * labels).reshape(rows, labels)

    true, predicted = references + offset, predictions + offset
    return count(true[right]), count(predicted.ravel()), count(true.ravel())


def _averages(tp: Ids, predicted: Ids, true: Ids) -> dict[str, Floats]:
    """Return every metric of ``METRICS``, each [R], of counts [R, K]."""
    n = true.sum(axis=1)
    accuracy = _ratio(tp.sum(axis=1), n)
    present = true + predicted > 0
    metrics = {"precision": _ratio(tp, predicted), "recall": _ratio(tp, true), "f1": _ratio(2 * tp, true + predicted)}
    found = {"accuracy": accuracy}
    for name, by_label in metrics.items():
        found[f"{name}_macro"] = by_label.sum(axis=1) / present.sum(axis=1)
        found[f"{name}_micro"] = accuracy  # one label each per example: every wrong answer misses one and adds one
        found[f"{name}_weighted"] = _ratio((by_label * true).sum(axis=1), n)
    return found


def _ratio(above: NDArray[np.generic], below: Ids) -> Floats:
    """Divide elementwise; 0/0 is 0."""
    quotient: Floats = np.divide(above, below, out=np.zeros(below.shape, dtype=np.float64), where=below > 0)
    return quotient
