"""Log-probabilities of given tokens, without ever holding scores of every token at every position.

Knows hidden states and a head, not models or batches. Read next: ``accumulate.py``.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["token_logprobs"]

Head = Callable[[Tensor], Tensor]

SCORES_AT_ONCE = 1 << 24
"""Scores (positions x vocabulary) held at once: 64 MB in float32."""


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the log-probability of each target.

    What fits is scored in one piece. What does not is scored piece by piece, each piece again in the backward pass, so
    that memory does not grow with positions x vocabulary.

    Args:
        hidden: [M, D] final hidden states.
        head: maps [m, D] to scores [m, V].
        targets: int64 [M].
        vocab_size: V.

    Returns:
        [M], float32 (float64 for a float64 model).
    """
    step = max(1, SCORES_AT_ONCE // vocab_size)
    if len(targets) <= step:
        return _piece(hidden, targets, head)
    return torch.cat(list(_pieces(hidden, head, targets, step)))


def _pieces(hidden: Tensor, head: Head, targets: Tensor, step: int) -> Iterator[Tensor]:
    for h, t in zip(torch.split(hidden, step), torch.split(targets, step), strict=True):
        if torch.is_grad_enabled():
            yield checkpoint(_piece, h, t, head, use_reentrant=False)
        else:
            yield _piece(h, t, head)


def _piece(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    scores = head(hidden)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    return -F.cross_entropy(scores, targets, reduction="none")
