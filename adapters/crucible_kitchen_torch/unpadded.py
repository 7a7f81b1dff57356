"""Attention over rows that stand one after another, without padding: every row attends to itself only.

Knows queries, keys and values, not models: everything but attention treats tokens alike, so only attention needs to
know where rows begin. Rows of one length that stand together are computed at once. Read next: ``tiny.py`` and
``unpadded_hf.py``, which use it.

Letters: N positions of all rows, T of one row, R rows of a run, H heads, E width of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

__all__ = ["Run", "attend_by_run", "padded", "positions", "runs", "unpadded"]


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one length, one after another.

    Attributes:
        start: position of the first.
        rows: R.
        length: T of each.
    """

    start: int
    rows: int
    length: int


def runs(lengths: Sequence[int]) -> list[Run]:
    """Return the runs of rows of these lengths."""
    found: list[Run] = []
    start = 0
    for length, members in groupby(lengths):
        found.append(Run(start, sum(1 for _ in members), length))
        start += found[-1].rows * length
    return found


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 [N]: from 0 in each row."""
    counts = torch.arange(max(lengths), device=device)
    return torch.cat([counts[:n] for n in lengths])


def attend_by_run(
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor], q: Tensor, k: Tensor, v: Tensor, found: Sequence[Run]
) -> Tensor:
    """Attend run by run.

    Args:
        attend: maps queries, keys and values [R, H, T, E] of a run and the number of the run to [R, T, H, E].
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
        y = attend(_rows(all_q[i], run), _rows(all_k[i], run), _rows(all_v[i], run), i)
        parts.append(y.reshape(1, sizes[i], *y.shape[2:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _rows(x: Tensor, run: Run) -> Tensor:
    """Shape [R, H, T, E] from [H, R * T, E]."""
    return x.view(x.shape[0], run.rows, run.length, x.shape[2]).transpose(0, 1)


def padded(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return rows [R, T] of tokens [N], padded on the right, where causal attention never looks."""
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(tokens, list(lengths))), batch_first=True)


def unpadded(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return [N, D] of padded rows [R, T, D]."""
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    return hidden[columns < torch.tensor(lengths, device=hidden.device)[:, None]]
