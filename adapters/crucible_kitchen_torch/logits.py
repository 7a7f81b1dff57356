"""The scores of every token at every position of a datum, computed when they are read: what a teacher hands out.

Knows hidden states and a head. Read next: ``outputs.py``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crucible_kitchen.types import Array
from crucible_kitchen_torch.logprobs import Head
from crucible_kitchen_torch.outputs import pieces, scores_of

__all__ = ["Logits"]


class Logits:
    """An array [T, V] of float numbers of which only hidden states [T, D] are in memory.

    It has ``shape``, is sliced and indexed along T, which gives arrays, and becomes an array by ``np.asarray``.

    Args:
        hidden: [T, D], detached.
        head: maps [m, D] to scores [m, V].
        vocab_size: V.
        check: raises once the scores would be others than those asked for.
    """

    def __init__(self, hidden: Tensor, head: Head, vocab_size: int, check: Callable[[], None]) -> None:
        self._hidden = hidden
        self._head = head
        self._check = check
        self.shape = (len(hidden), vocab_size)
        self.ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: slice | Array) -> Array:
        return self._scores(self._hidden[at if isinstance(at, slice) else torch.from_numpy(np.asarray(at))])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        del copy  # it is always a new array
        found = self._scores(self._hidden)
        return found if dtype is None else found.astype(dtype, copy=False)

    @torch.no_grad()
    def _scores(self, hidden: Tensor) -> Array:
        self._check()
        parts = [scores_of(self._head, hidden[at]).cpu().numpy() for at, _ in pieces(len(hidden), self.shape[1])]
        return np.concatenate(parts) if parts else np.zeros((0, self.shape[1]), dtype=np.float32)
