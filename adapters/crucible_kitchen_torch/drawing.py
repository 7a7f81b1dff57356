"""How a token is drawn: temperature, top-k, top-p, and one number of each row's own generator.

Knows scores and settings, not models. Read next: ``decoding.py``.

Letters: R rows, V vocabulary, B blocks of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crucible_kitchen.types import SamplingParams
from crucible_kitchen_torch.randomness import uniforms

__all__ = ["Draws", "draw"]

_BLOCK = 256  # tokens whose probability is summed before single ones are looked at


@dataclass(slots=True, eq=False)
class Draws:
    """One sample's settings, its generator and what was drawn so far.

    Attributes:
        params: how to draw.
        seed: of the request.
        index: of the sample within the request.
        tokens: drawn so far.
        logprobs: of each under the processed distribution.
        raw: of each under the model's own, if asked for.
        top: ids and log-probabilities of the likeliest under the model's own, if asked for.
    """

    params: SamplingParams
    seed: int
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    _random: np.random.Generator | None = field(default=None, init=False)

    def uniform(self) -> float:
        """Return the next number of the sample's own generator, which is made when first asked: in the lane."""
        if self._random is None:
            self._random = uniforms(self.seed, self.index)
        return self._random.random()


def draw(scores: Tensor, rows: Sequence[Draws]) -> list[int]:
    """Draw one token per row from its processed distribution and write it down.

    Temperature first, then top-k, then top-p (the smallest set of the likeliest tokens that reaches the probability).
    Temperature 0 takes the likeliest token, whose log-probability under that distribution is 0. What a row gets does
    not depend on the others, to the last bit.

    Args:
        scores: [R, V].
        rows: R of them; one number is taken from each one's generator.

    Returns:
        The tokens.
    """
    scores = scores.float() if scores.dtype != torch.float64 else scores
    device = scores.device
    heats = [row.params.temperature or 1.0 for row in rows]
    heated = scores if all(h == 1 for h in heats) else scores / scores.new_tensor(heats)[:, None]
    at = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=device)
    drawn, logprobs = _invert(_truncate(heated, rows), at)
    if not all(row.params.temperature for row in rows):
        greedy = torch.tensor([row.params.temperature == 0 for row in rows], device=device)
        drawn = torch.where(greedy, scores.argmax(dim=-1), drawn)
        logprobs = logprobs.masked_fill(greedy, 0.0)
    tokens: list[int] = drawn.tolist()
    for row, token, logprob in zip(rows, tokens, logprobs.tolist(), strict=True):
        row.tokens.append(token)
        row.logprobs.append(logprob)
    _describe(scores, rows)
    return tokens


def _invert(scores: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the cumulative distribution passes ``at``, and their log-probabilities.

    Sums are in float64 and go over blocks first, so that one row costs one pass over its scores and not a cumulative
    sum of all of them.
    """
    count, size = scores.shape
    highest = scores.amax(dim=-1, keepdim=True)
    mass = (scores - highest).exp_()
    if size % _BLOCK:
        mass = F.pad(mass, (0, -size % _BLOCK))
    mass = mass.view(count, -1, _BLOCK)
    heights = mass.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    whole = heights[:, -1:]
    goal = torch.minimum(at[:, None] * whole, _below(whole))
    block = torch.searchsorted(heights, goal, right=True)
    before = F.pad(heights, (1, 0)).gather(1, block)
    inside = mass[torch.arange(count, device=scores.device), block[:, 0]].double().cumsum(dim=-1)
    inner = torch.searchsorted(inside, torch.minimum(goal - before, _below(inside[:, -1:])), right=True)
    tokens = block * _BLOCK + inner
    logprobs = scores.gather(1, tokens) - highest - whole.log().to(scores.dtype)
    return tokens[:, 0], logprobs[:, 0]


def _below(x: Tensor) -> Tensor:
    """Return a little less: rounding must not lead past the last token that has a probability."""
    return x * (1 - 1e-15)


def _truncate(scores: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Set scores outside top-k and top-p to minus infinity, in the rows that ask for it."""
    cut = [i for i, row in enumerate(rows) if row.params.top_k or row.params.top_p < 1]
    if not cut:
        return scores
    index = torch.tensor(cut, device=scores.device)
    return scores.index_copy(0, index, _truncated(scores[index], [rows[i].params for i in cut]))


def _truncated(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    size = scores.shape[1]
    k = torch.tensor([min(p.top_k or size, size) for p in params], device=scores.device)
    p = torch.tensor([p.top_p for p in params], device=scores.device, dtype=torch.float64)
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(torch.arange(size, device=scores.device) >= k[:, None], -torch.inf)
    mass = ranked.double().softmax(dim=-1)
    before = mass.cumsum(dim=-1) - mass
    ranked = ranked.masked_fill((before >= p[:, None]) & (p[:, None] < 1), -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ranked)


def _describe(scores: Tensor, rows: Sequence[Draws]) -> None:
    """Write down what rows want to know of the model's own distribution."""
    asking = [i for i, row in enumerate(rows) if row.params.raw_logprobs or row.params.top_logprobs]
    if not asking:
        return
    logprobs = scores[torch.tensor(asking, device=scores.device)].log_softmax(dim=-1)
    for i, own in zip(asking, logprobs, strict=True):
        row = rows[i]
        if row.params.raw_logprobs:
            row.raw.append(float(own[row.tokens[-1]]))
        if row.params.top_logprobs:
            best = own.topk(min(row.params.top_logprobs, len(own)))
            row.top.append((best.indices.tolist(), best.values.tolist()))
