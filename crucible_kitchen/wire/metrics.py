"""Names of metrics say how parts combine: ``name:sum``, ``name:mean``, ``name:min``, ``name:max``.

Read next: ``crucible_kitchen.wire.messages``.
"""

import math
from collections.abc import Mapping, Sequence

__all__ = ["combine_metrics", "metrics_from_wire", "metrics_to_wire"]


def combine_metrics(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Combine the metrics of parts, each given with its number of data, which weighs means."""
    found: dict[str, list[tuple[float, int]]] = {}
    for part, size in parts:
        for key, value in part.items():
            found.setdefault(key, []).append((float(value), size))
    return {key: _combined(key, values) for key, values in found.items()}


def _combined(key: str, values: Sequence[tuple[float, int]]) -> float:
    kind = key.rpartition(":")[2]
    numbers = [value for value, _ in values]
    if kind == "min":
        return min(numbers)
    if kind == "max":
        return max(numbers)
    if kind == "mean":
        total = sum(size for _, size in values)
        return sum(value * size for value, size in values) / total if total else math.nan
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def metrics_to_wire(metrics: Mapping[str, float]) -> dict[str, float]:
    """Name how sums combine, which the wire always asks for."""
    return {name if ":" in name else f"{name}:sum": float(value) for name, value in metrics.items()}


def metrics_from_wire(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out that a sum is one."""
    return {name.removesuffix(":sum"): float(value) for name, value in metrics.items()}
