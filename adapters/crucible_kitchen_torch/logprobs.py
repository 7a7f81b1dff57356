"""Log-probabilities of given tokens, without ever holding scores of every token at every position.

Scores are the largest thing that training holds: a piece of them is held once, becomes probabilities and then its own
gradient in the same memory. Knows hidden states and a head, not models or batches. Read next: ``accumulate.py``.

Letters: M chosen positions, m those of a piece, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["token_logprobs"]

Head = Callable[[Tensor], Tensor]

SCORES_AT_ONCE = 1 << 24
"""Scores (positions x vocabulary) of one piece: 64 MB in float32."""

PIECES_KEPT = 4
"""How many pieces are kept for the backward pass, one tensor each; of more, every one is scored again there."""

_NEAR = 1 << 18
"""Scores worked on at a time, 1 MB in float32: what was read is still in the processor's cache when it is written."""


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the log-probability of each target.

    Scored piece by piece. A few pieces are kept for the backward pass; of many each is scored again there, so that
    memory does not grow with positions x vocabulary.

    Args:
        hidden: [M, D] final hidden states.
        head: maps [m, D] to scores [m, V]: a tensor of its own that nobody else reads, or what it was given.
        targets: int64 [M].
        vocab_size: V.

    Returns:
        [M], float32 (float64 for a float64 model).
    """
    found = list(_pieces(hidden, head, targets, vocab_size))
    return found[0] if len(found) == 1 else torch.cat(found)


def _pieces(hidden: Tensor, head: Head, targets: Tensor, vocab_size: int) -> Iterator[Tensor]:
    size = max(1, SCORES_AT_ONCE // vocab_size)
    again = torch.is_grad_enabled() and len(targets) > PIECES_KEPT * size
    for h, t in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
        yield checkpoint(_piece, h, t, head, use_reentrant=False) if again else _piece(h, t, head)


def _piece(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    scores = head(hidden)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    elif scores is hidden:  # the model scored: its own backward pass may need them
        scores = scores.clone()
    return _Chosen.apply(scores, targets)  # type: ignore[no-any-return,no-untyped-call]


class _Chosen(torch.autograd.Function):
    """``scores.log_softmax(-1)[targets]``; in the memory of the scores, which are lost.

    torch's own takes three more tensors of that size and reads or writes them eight times.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor) -> Tensor:
        """Return [m]; what is left of the scores is exp(score - highest), and its sum."""
        chosen, mass = scores.new_empty(len(scores), 1), scores.new_empty(len(scores), 1)
        rows = max(1, _NEAR // scores.shape[1])
        parts = (torch.split(x, rows) for x in (scores, targets[:, None], chosen, mass))
        for some, at, one, whole in zip(*parts, strict=True):
            some.sub_(some.amax(dim=-1, keepdim=True))
            torch.gather(some, 1, at, out=one)
            torch.sum(some.exp_(), dim=-1, keepdim=True, out=whole)
        ctx.save_for_backward(scores, mass, targets)
        return chosen.sub_(mass.log())[:, 0]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """Return slope * (one at the target - probability)."""
        powers, mass, targets = ctx.saved_tensors
        slope = slopes[0][:, None]
        powers.mul_(-slope / mass)
        return powers.scatter_add_(1, targets[:, None], slope), None
