"""Which datums share a micro-batch, and which positions datums share.

Knows lengths and tokens, no model. Read next: ``accumulate.py``, which computes them.
"""

from collections.abc import Sequence

import numpy as np

from crucible_kitchen.learner.packing import balance, best_fit_decreasing
from crucible_kitchen.types import Datum

__all__ = ["plan", "shared_beginnings"]

WORTH_SHARING = 16
"""Fewest common positions that are computed once for two datums: attention in parts costs a little."""


def shared_beginnings(datums: Sequence[Datum], group: int) -> dict[int, int]:
    """Return how many positions a datum shares with the first of its group, by the datum's number, where worthwhile.

    Each keeps at least one position of its own.
    """
    found: dict[int, int] = {}
    for i, datum in enumerate(datums):
        first = datums[i - i % group]
        if datum is first or "tokens" not in datum.inputs:
            continue
        tokens, others = datum.inputs["tokens"], first.inputs["tokens"]
        most = min(len(tokens), len(others))
        parts = np.flatnonzero(tokens[:most] != others[:most])
        shared = min(int(parts[0]) if len(parts) else most, len(tokens) - 1)
        if shared >= WORTH_SHARING:
            found[i] = shared
    return found


def plan(lengths: Sequence[int], group: int, budget: int) -> list[list[int]]:
    """Split datums into few micro-batches, their attention about equally costly.

    Best-fit decreasing, then balanced by the sum of squared lengths. The largest comes first, so that a lack of memory
    shows at once; in each, groups of like length stand together, since equal lengths attend at once. A group is never
    separated; one that exceeds the budget alone is a micro-batch of its own.

    Args:
        lengths: T of each datum.
        group: how many consecutive datums belong together.
        budget: most positions of a micro-batch.

    Returns:
        Indices of the datums of each micro-batch; groups stay whole and in order within themselves.
    """
    sizes = [sum(lengths[i : i + group]) for i in range(0, len(lengths), group)]
    bins = balance(sizes, best_fit_decreasing(sizes, budget), budget)
    cost = [(sum(sizes[g] for g in members), -min(members)) for members in bins]
    found: list[list[int]] = []
    for b in sorted(range(len(bins)), key=lambda b: cost[b], reverse=True):
        order = sorted(bins[b], key=lambda g: (-lengths[g * group], -sizes[g], g))
        found.append([i for g in order for i in range(g * group, (g + 1) * group)])
    return found
