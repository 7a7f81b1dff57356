"""Attention over rows that stand one after another, without padding: every row attends to itself only.

Knows queries, keys and values, not models: everything but attention treats tokens alike, so only attention needs to
know where rows begin. Rows of one length that stand together are computed at once. Read next: ``tiny.py`` and
``unpadded_hf.py``, which use it.

A row may continue another: it shares that row's first positions, which are computed once, and attends to them and to
itself.

Letters: N positions of all rows, T of one row, R rows of a run, H heads, E width of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Joins", "Run", "among_many", "attend_by_run", "looks_back", "positions", "runs"]

Joins: TypeAlias = Mapping[int, tuple[int, int]]
"""By the number of a row that continues another: that row's number, and how many of its positions are shared."""


LEAST = 16
"""Fewest positions of a matrix product that have the bits that they have among many: fewer take other kernels."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one length, one after another.

    Attributes:
        start: position of the first.
        rows: R.
        length: T of each.
        shared: positions of another row that come before the only row; 0: none.
        trunk: the run that has that row.
        offset: where in that run it begins.
    """

    start: int
    rows: int
    length: int
    shared: int = 0
    trunk: int = 0
    offset: int = 0


def runs(lengths: Sequence[int], joins: Joins | None = None) -> list[Run]:
    """Return the runs of rows of these lengths; a row that continues another is a run of its own."""
    joins = joins or {}
    found: list[Run] = []
    places: list[tuple[int, int]] = []  # of each row: its run, and where in it the row begins
    start = 0
    for row, length in enumerate(lengths):
        last = found[-1] if found else None
        if row in joins:
            trunk, shared = joins[row]
            found.append(Run(start, 1, length, shared, *places[trunk]))
        elif last is not None and not last.shared and last.length == length:
            found[-1] = Run(last.start, last.rows + 1, length)
        else:
            found.append(Run(start, 1, length))
        places.append((len(found) - 1, start - found[-1].start))
        start += length
    return found


def positions(lengths: Sequence[int], device: torch.device, joins: Joins | None = None) -> Tensor:
    """Return int64 [N]: from 0 in each row, from the number of shared positions in one that continues another."""
    begins = [(joins or {}).get(row, (0, 0))[1] for row in range(len(lengths))]
    counts = torch.arange(max(b + n for b, n in zip(begins, lengths, strict=True)), device=device)
    return torch.cat([counts[b : b + n] for b, n in zip(begins, lengths, strict=True)])


def looks_back(run: Run, device: torch.device, window: int | None = None) -> Tensor:
    """Return what a row that continues another may look at, bool [1, 1, T, shared + T], within a window if given."""
    whole = torch.ones(run.length, run.shared + run.length, dtype=torch.bool, device=device)
    seen = whole.tril(run.shared)
    return (seen if window is None else seen & whole.triu(run.shared - window + 1))[None, None]


def attend_by_run(
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor], q: Tensor, k: Tensor, v: Tensor, found: Sequence[Run]
) -> Tensor:
    """Attend run by run.

    Args:
        attend: maps queries [R, H, T, E], keys and values [R, H', S, E] of a run and its number to [R, T, H, E]; S is
            the shared positions and T.
        q: [1, H, N, E].
        k: [1, H', N, E].
        v: [1, H', N, E].
        found: the runs.

    Returns:
        [1, N, H, E].
    """
    sizes = [run.rows * run.length for run in found]
    parts: list[Tensor] = []
    # One split each: its backward pass is one concatenation, where every slice would fill zeros of the whole length.
    all_q, all_k, all_v = (torch.split(x.squeeze(0), sizes, dim=1) for x in (q, k, v))
    for i, run in enumerate(found):
        y = attend(_rows(all_q[i], run), _seen(all_k, run, i), _seen(all_v, run, i), i)
        parts.append(y.reshape(1, sizes[i], *y.shape[2:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _seen(parts: Sequence[Tensor], run: Run, number: int) -> Tensor:
    """Return keys or values of a run, those that it shares before its own."""
    own = _rows(parts[number], run)
    if not run.shared:
        return own
    return torch.cat([parts[run.trunk][None, :, run.offset : run.offset + run.shared], own], dim=2)


def _rows(x: Tensor, run: Run) -> Tensor:
    """Shape [R, H, T, E] from [H, R * T, E]."""
    return x.view(x.shape[0], run.rows, run.length, x.shape[2]).transpose(0, 1)


def among_many(fn: Callable[[Tensor], Tensor], rows: Tensor, positions: int) -> Tensor:
    """Return what a function gives for rows; a few positions are computed with copies of themselves.

    So a row's bits do not depend on how many others there are: in float32 the gradient of eight tokens would differ by
    1.1e-6 from that of two times four.

    Args:
        fn: maps [R, ...] to [R, ...], row by row.
        rows: [R, ...].
        positions: how many these rows have together.
    """
    times = -(-LEAST // positions)
    return fn(rows) if times == 1 else fn(torch.cat([rows] * times))[: len(rows)]
