"""What a model says at each position, without ever holding scores of every token at every position.

Knows hidden states and a head, not models or batches. Read next: ``accumulate.py``, and
``crucible_kitchen.types.Output``.

Letters: M positions, D width, V vocabulary, k tokens of a position.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crucible_kitchen_torch import logprobs
from crucible_kitchen_torch.logprobs import Head, token_logprobs

__all__ = ["Wanted", "pieces", "scores_of", "token_outputs"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which numbers to make of the scores.

    Attributes:
        logprobs: of the targets.
        entropy: of the whole distribution.
        named: log-probabilities of tokens that are given.
        top: of so many likeliest tokens, and which those are; 0: none.
    """

    logprobs: bool = False
    entropy: bool = False
    named: bool = False
    top: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What ``token_outputs`` returns, in order."""
        found = [name for name in ("logprobs", "entropy") if getattr(self, name)]
        return (*found, *(["top_logprobs"] if self.named or self.top else []), *(["top_tokens"] if self.top else []))


def token_outputs(
    hidden: Tensor, head: Head, wanted: Wanted, vocab_size: int, targets: Tensor | None, named: Tensor | None
) -> dict[str, Tensor]:
    """Return numbers of each position.

    What fits is scored in one piece. What does not is scored piece by piece, each piece again in the backward pass, so
    that memory does not grow with positions x vocabulary.

    Args:
        hidden: [M, D] final hidden states.
        head: maps [m, D] to scores [m, V].
        wanted: which numbers.
        vocab_size: V.
        targets: int64 [M], for ``logprobs``.
        named: int64 [M, k], for ``named``.

    Returns:
        ``logprobs`` and ``entropy`` [M], ``top_logprobs`` [M, k], float32 (float64 for a float64 model), and
        ``top_tokens`` int64 [M, k].
    """
    if not wanted.names:
        return {}
    if wanted == Wanted(logprobs=True):
        assert targets is not None
        return {"logprobs": token_logprobs(hidden, head, targets, vocab_size)}
    found = [
        _again(_piece, hidden[at], head, wanted, _at(targets, at), _at(named, at), again=again)
        for at, again in pieces(len(hidden), vocab_size)
    ]
    return {name: _joined([part[i] for part in found]) for i, name in enumerate(wanted.names)}


def pieces(positions: int, vocab_size: int, scores: int | None = None) -> Iterator[tuple[slice, bool]]:
    """Yield slices of which so many scores may be held at once, and whether there are several."""
    step = max(1, (scores or logprobs.SCORES_AT_ONCE) // vocab_size)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions)), positions > step


def scores_of(head: Head, hidden: Tensor) -> Tensor:
    """Return scores [m, V] in float32, float64 for a float64 model."""
    scores = head(hidden)
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


def _again(fn: Callable[..., tuple[Tensor, ...]], *args: object, again: bool) -> tuple[Tensor, ...]:
    """Call a function; with ``again`` its inner values are not kept for the backward pass but computed again."""
    if again and torch.is_grad_enabled():
        return checkpoint(fn, *args, use_reentrant=False)  # type: ignore[no-any-return]
    return fn(*args)


def _at(tensor: Tensor | None, at: slice) -> Tensor | None:
    return None if tensor is None else tensor[at]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _piece(
    hidden: Tensor, head: Head, wanted: Wanted, targets: Tensor | None, named: Tensor | None
) -> tuple[Tensor, ...]:
    scores = scores_of(head, hidden)
    found: list[Tensor] = []
    if wanted.logprobs:
        assert targets is not None
        found.append(-F.cross_entropy(scores, targets, reduction="none"))
    if not (wanted.entropy or wanted.named or wanted.top):
        return tuple(found)
    whole = torch.logsumexp(scores, dim=-1, keepdim=True)
    if wanted.entropy:
        found.append(whole.squeeze(-1) - (torch.softmax(scores, dim=-1) * scores).sum(dim=-1))
    if wanted.named:
        assert named is not None
        found.append(scores.gather(-1, named) - whole)
    if wanted.top:
        best = scores.topk(wanted.top, dim=-1)
        found += [best.values - whole, best.indices]
    return tuple(found)
