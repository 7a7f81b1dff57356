"""Whether a forward pass is worth more than one thread: waking another costs more than a small product can save.

Threads sleep while they wait (see ``client.py``), and each product wakes them again, tens of microseconds each time.
The choice depends on sizes only, never on a measurement, so that the same samples have the same bits. Knows
parameters, not models. Read next: ``decoding.py``.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch

__all__ = ["enough_threads", "mean_matrix"]

WORTH_WAKING = 10_000_000
"""Multiplications of a mean product from which on waking the other threads pays."""

READING = 12
"""Positions whose products with a number cost as much as reading it."""

MATRICES, ATTENTIONS = 7, 2
"""Products with matrices and with keys or values in a layer."""


def mean_matrix(parameters: Iterable[torch.Tensor]) -> float:
    """Return the mean number of weights of the matrices among these parameters."""
    sizes = [p.numel() for p in parameters if p.dim() > 1]
    return sum(sizes) / max(1, len(sizes))


@contextmanager
def enough_threads(matrix: float, positions: int, keys: int = 0) -> Generator[None, None, None]:
    """Compute in one thread as long as the block lasts, if more would make it slower.

    Args:
        matrix: weights of a mean matrix.
        positions: of all rows, that are computed at a time.
        keys: numbers of a layer's keys that attention reads, each for one position.
    """
    threads = torch.get_num_threads()
    work = MATRICES * matrix * (READING + positions) + ATTENTIONS * keys * (READING + 1)
    if threads == 1 or work >= (MATRICES + ATTENTIONS) * WORTH_WAKING:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
