"""Packing: which rows share a bin of a token budget, so that nothing is wasted and no bin costs more than another.

Knows lengths only, neither tokens nor models. Read next: ``crucible_kitchen.learner.schedules``.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

__all__ = ["attention_cost", "balance", "best_fit_decreasing", "lower_bound"]

PARTNERS = 8
"""Cheap bins that are tried with a costly one."""


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into few bins: the longest first, each into the fullest bin that still takes it.

    At most 11/9 of the fewest bins, plus 4 (Johnson et al. 1974); on lengths as datasets have them, the fewest or
    nearly so. Bins of one fill are interchangeable, so the search goes over the distinct amounts of free space:
    O(n log capacity).

    Args:
        lengths: tokens of each row, 1 or more.
        capacity: most tokens of a bin. A longer row has a bin to itself.

    Returns:
        Indices of the rows of each bin; equal lengths keep their order.
    """
    bins: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # free space -> the bins that have it
    spaces: list[int] = []  # the keys of by_free, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, lengths[i])
        if at == len(spaces):
            found, free = len(bins), max(0, capacity - lengths[i])
            bins.append([])
        else:
            space = spaces[at]
            found, free = by_free[space].pop(), space - lengths[i]
            if not by_free[space]:
                del by_free[space], spaces[at]
        bins[found].append(i)
        if free and free not in by_free:
            insort(spaces, free)
            by_free[free] = []
        if free:
            by_free[free].append(found)
    return bins


def lower_bound(lengths: Sequence[int], capacity: int) -> int:
    """Return a number of bins that no packing can do without.

    For every ``a`` up to half of the capacity C, with rows longer than C cut to it (Martello & Toth 1990, L2)::

        L(a) = |{s > C / 2}| + max(0, ceil((sum{a <= s <= C / 2} - sum{C - s: C / 2 < s <= C - a}) / C))

    Rows longer than ``C - a`` share a bin with none of the rows counted. ``a = 0`` gives at least ``ceil(sum / C)``
    once the rest is counted as well, which is why that bound is taken too.

    Args:
        lengths: tokens of each row, 1 or more.
        capacity: C, tokens of a bin.
    """
    s = np.sort(np.minimum(np.asarray(lengths, dtype=np.int64), capacity))
    if not len(s):
        return 0
    sums = np.concatenate([[0], np.cumsum(s)])
    half = int(np.searchsorted(s, capacity // 2, side="right"))  # s[half:] are longer than half of a bin
    large = len(s) - half
    best = max(-(-int(sums[-1]) // capacity), large)
    for first in np.unique(np.searchsorted(s, s[:half], side="left")):
        a = int(s[first])
        end = int(np.searchsorted(s, capacity - a, side="right"))
        room = (end - half) * capacity - int(sums[end] - sums[half])
        missing = int(sums[half] - sums[first]) - room
        best = max(best, large + max(0, -(-missing // capacity)))
    return best


def attention_cost(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> list[int]:
    """Return the sum of squared lengths of each bin, what attention isolated per row costs."""
    return [sum(lengths[i] ** 2 for i in members) for members in bins]


def balance(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> list[list[int]]:
    """Even out the sum of squared lengths between bins, without a bin more and without exceeding the capacity.

    From the costliest down, a bin is dealt anew together with a cheap one, the longest row first, each to the cheaper
    of the two that has room; what makes the costlier of both cheaper is kept. A bin that none of the cheapest can help
    (one long row fills it) stays as it is.

    Args:
        lengths: tokens of each row.
        bins: indices of the rows of each bin.
        capacity: most tokens of a bin; one that holds a longer row stays as it is.

    Returns:
        As many bins as before, holding the same rows.
    """
    found = [list(members) for members in bins]
    order = sorted((cost, b) for b, cost in enumerate(attention_cost(lengths, found)))
    top = len(order) - 1
    while top > 0:
        high = order[top]
        for low in order[: min(top, PARTNERS)]:
            dealt = _deal(lengths, found[low[1]] + found[high[1]], capacity)
            new = attention_cost(lengths, dealt)
            if dealt and max(new) < high[0]:
                break
        else:
            top -= 1
            continue
        for old, members, cost in zip((low, high), dealt, new, strict=True):
            found[old[1]] = members
            order.remove(old)
            insort(order, (cost, old[1]))
    return found


def _deal(lengths: Sequence[int], members: Sequence[int], capacity: int) -> list[list[int]]:
    """Deal rows to two bins; an empty list if they do not fit."""
    hands: tuple[list[int], list[int]] = ([], [])
    tokens, cost = [0, 0], [0, 0]
    for i in sorted(members, key=lambda i: (-lengths[i], i)):
        cheaper = 0 if cost[0] <= cost[1] else 1
        to = cheaper if tokens[cheaper] + lengths[i] <= capacity else 1 - cheaper
        if tokens[to] + lengths[i] > capacity:
            return []
        hands[to].append(i)
        tokens[to] += lengths[i]
        cost[to] += lengths[i] ** 2
    return list(hands) if all(hands) else []
