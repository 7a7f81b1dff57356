"""Which datums share a micro-batch, with padding and without.

Knows lengths and tokens, no model. Read next: ``accumulate.py``, which computes them.
"""

import math
from collections.abc import Sequence

import numpy as np

from crucible_kitchen.learner.packing import balance, best_fit_decreasing
from crucible_kitchen.types import Datum

__all__ = ["plan", "plan_padded", "shared_beginnings"]

BATCH_COST = 64
"""What a micro-batch costs beside its positions, in positions: many small operations, measured on small models."""

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
    """Split datums into few micro-batches without padding, their attention about equally costly.

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


def plan_padded(lengths: Sequence[int], group: int, budget: int) -> list[list[int]]:
    """Split datums into micro-batches of the least cost: positions, padding counted, and ``BATCH_COST`` for each.

    Groups of like length come together, the longest first, so that a lack of memory shows at once; where one
    micro-batch ends and the next begins is found by dynamic programming. A group is never separated; one that exceeds
    the budget alone is a micro-batch of its own.

    Args:
        lengths: T of each datum.
        group: how many consecutive datums belong together.
        budget: most positions of a micro-batch, padding counted.

    Returns:
        Indices of the datums of each micro-batch; groups stay whole and in order within themselves.
    """
    longest = [max(lengths[i : i + group]) for i in range(0, len(lengths), group)]
    order = sorted(range(len(longest)), key=lambda g: -longest[g])
    least = [0.0, *[math.inf] * len(order)]  # cost of the first groups
    begin = [0] * (len(order) + 1)  # where the micro-batch that ends there begins
    for i, g in enumerate(order):
        wide = longest[g] * group
        base = least[i] + BATCH_COST
        for n in range(1, min(max(1, budget // wide), len(order) - i) + 1):
            if base + n * wide < least[i + n]:
                least[i + n], begin[i + n] = base + n * wide, i
    batches: list[list[int]] = []
    end = len(order)
    while end:
        chosen, end = order[begin[end] : end], begin[end]
        batches.append([i for g in chosen for i in range(g * group, (g + 1) * group)])
    return batches[::-1]
