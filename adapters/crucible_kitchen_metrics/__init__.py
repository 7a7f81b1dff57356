"""Evaluation by counting: accuracy, precision, recall, F1, exact match, with bootstrap intervals.

Read next: ``crucible_kitchen_metrics.evaluator``.
"""

from crucible_kitchen_metrics.evaluator import MetricsEvaluator as MetricsEvaluator

__all__ = ["MetricsEvaluator"]
