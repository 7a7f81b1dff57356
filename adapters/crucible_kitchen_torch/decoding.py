"""One batch of samples being decoded with a key-value cache, and how a token is drawn.

Knows models and weights, not who waits. Read next: ``sampling.py``, which feeds it.

Letters: R rows still being decoded, P distinct prompts, S positions seen so far, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from crucible_kitchen.types import Sampled, SamplingParams
from crucible_kitchen_torch.randomness import uniforms
from crucible_kitchen_torch.trainer import Snapshot, Trainer

__all__ = ["Decoding", "Job", "draw"]


class Owner(Protocol):
    """Whoever asked for a sample."""

    cancelled: bool

    def deliver(self, index: int, sampled: Sampled) -> None:
        """Take a finished sample."""
        ...

    def fail(self, error: Exception) -> None:
        """Take an error instead."""
        ...


@dataclass(slots=True, eq=False)
class Job:
    """One sample to decode: sample ``index`` of a request, at most ``length`` tokens."""

    request: Owner
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    length: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = uniforms(self.seed, self.index)


class Decoding:
    """Samples decoded together, all methods in the lane.

    Prompts are padded on the left and computed once each, some columns a turn; then every turn is one token for every
    row. Rows leave as soon as they end.
    """

    def __init__(self, trainer: Trainer, snapshot: Snapshot, jobs: list[Job]) -> None:
        self._trainer = trainer
        self._model = trainer.model
        self._snapshot = snapshot
        self._ends = self._model.facts.end_ids
        self._device = next(self._model.module.parameters()).device
        self.active = list(jobs)
        self._cache: Any = None
        self._scores: Tensor | None = None
        prompts = list(dict.fromkeys(job.prompt for job in jobs))
        place = {prompt: row for row, prompt in enumerate(prompts)}
        self._rows = [place[job.prompt] for job in jobs]
        longest = max(len(p) for p in prompts)
        self._tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self._mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            self._tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            self._mask[row, longest - len(prompt) :] = True
        self._positions = (self._mask.long().cumsum(1) - 1).clamp(min=0)
        self._filled = 0
        self._columns = max(1, trainer.budget // len(prompts))

    @torch.no_grad()
    def advance(self) -> list[tuple[Job, Sampled]]:
        """Do one turn of work; return the samples that ended."""
        if self._filled < self._tokens.shape[1]:
            self._prefill()
            return []
        return self._step()

    def _prefill(self) -> None:
        """Compute the next columns of the prompts; after the last, give each sample a row of its own."""
        upto = min(self._filled + self._columns, self._tokens.shape[1])
        part = slice(self._filled, upto)
        self._score(self._tokens[:, part], self._positions[:, part], self._mask[:, :upto])
        self._filled = upto
        if upto == self._tokens.shape[1]:
            self._positions = self._positions[:, -1:]
            self._keep(self._rows)

    def _score(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> None:
        with self._trainer.weights(self._snapshot):
            self._scores, self._cache = self._model.next_scores(
                tokens.to(self._device), positions.to(self._device), mask.to(self._device), self._cache
            )

    def _keep(self, rows: list[int]) -> None:
        """Keep these rows of everything that has one row per sample."""
        index = torch.tensor(rows, dtype=torch.int64)
        there = index.to(self._device)
        assert self._scores is not None
        self._scores = self._scores[there]
        self._cache = self._model.select(self._cache, there)
        self._mask, self._positions = self._mask[index], self._positions[index]

    def _step(self) -> list[tuple[Job, Sampled]]:
        """Draw one token per row, let finished rows go, and score the next token of the others."""
        self._leave([row for row, job in enumerate(self.active) if not job.request.cancelled])
        if not self.active:
            return []
        assert self._scores is not None
        tokens, logprobs = draw(self._scores, self.active)
        ended: list[tuple[Job, Sampled]] = []
        staying: list[int] = []
        for row, (job, token, logprob) in enumerate(zip(self.active, tokens, logprobs, strict=True)):
            job.tokens.append(token)
            job.logprobs.append(logprob)
            sampled = self._finished(job)
            if sampled is None:
                staying.append(row)
            else:
                ended.append((job, sampled))
        self._leave(staying)
        if self.active:
            last = torch.tensor([[job.tokens[-1]] for job in self.active])
            self._positions = self._positions + 1
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.active), 1)], dim=1)
            self._score(last, self._positions, self._mask)
        return ended

    def _leave(self, staying: list[int]) -> None:
        """Drop all rows but these."""
        if len(staying) < len(self.active):
            self.active = [self.active[row] for row in staying]
            if staying:
                self._keep(staying)
            else:
                self._cache = self._scores = None

    def _finished(self, job: Job) -> Sampled | None:
        """Return the sample if it has ended, else None."""
        if job.tokens[-1] in self._ends:
            return self._sampled(job, self._model.tokenizer.decode(job.tokens[:-1]), "stop")
        text = self._cut(job)
        if text is not None:
            return self._sampled(job, text, "stop")
        if len(job.tokens) >= job.length:
            return self._sampled(job, self._model.tokenizer.decode(job.tokens), "length")
        return None

    def _cut(self, job: Job) -> str | None:
        """Return the text before the first stop text, or None if there is none yet.

        Only the end of the text is decoded at each token: a token is at least one byte, so a stop text that the newest
        token completes lies within as many tokens as it has bytes, and some more for special tokens.
        """
        stops = job.params.stop
        if not stops:
            return None
        decode = self._model.tokenizer.decode
        tail = decode(job.tokens[-(max(len(s.encode()) for s in stops) + 8) :])
        if not any(s in tail for s in stops):
            return None
        text = decode(job.tokens)
        found = [at for at in (text.find(s) for s in stops) if at >= 0]
        return text[: min(found)] if found else None

    def _sampled(self, job: Job, text: str, reason: Literal["stop", "length"]) -> Sampled:
        return Sampled(
            tokens=np.array(job.tokens, dtype=np.int64),
            logprobs=np.array(job.logprobs, dtype=np.float32),
            text=text,
            stop_reason=reason,
            version=self._snapshot.version,
        )


def draw(scores: Tensor, jobs: list[Job]) -> tuple[list[int], list[float]]:
    """Draw one token per row from its processed distribution.

    Temperature first, then top-k, then top-p (the smallest set of the likeliest tokens that reaches the probability).
    Temperature 0 takes the likeliest token, whose log-probability under that distribution is 0.

    Args:
        scores: [R, V].
        jobs: what each row asks for; one number is drawn from each one's generator.

    Returns:
        Tokens and their log-probabilities, R of each.
    """
    scores = scores.float() if scores.dtype != torch.float64 else scores
    greedy = torch.tensor([job.params.temperature == 0 for job in jobs], device=scores.device)
    heat = torch.tensor([job.params.temperature or 1.0 for job in jobs], device=scores.device, dtype=scores.dtype)
    logprobs = _truncate(scores / heat[:, None], jobs).log_softmax(dim=-1)
    heights = logprobs.exp().double().cumsum(dim=-1)
    at = torch.tensor([[job.random.random()] for job in jobs], dtype=torch.float64, device=scores.device)
    tokens = torch.searchsorted(heights, at * heights[:, -1:], right=True).clamp(max=scores.shape[1] - 1)[:, 0]
    tokens = torch.where(greedy, scores.argmax(dim=-1), tokens)
    found = logprobs.gather(1, tokens[:, None])[:, 0].masked_fill(greedy, 0.0)
    return tokens.tolist(), found.tolist()


def _truncate(scores: Tensor, jobs: list[Job]) -> Tensor:
    """Set scores outside top-k and top-p to minus infinity."""
    if all(job.params.top_k == 0 and job.params.top_p == 1 for job in jobs):
        return scores
    size = scores.shape[1]
    k = torch.tensor([min(job.params.top_k or size, size) for job in jobs], device=scores.device)
    p = torch.tensor([job.params.top_p for job in jobs], device=scores.device, dtype=torch.float64)
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(torch.arange(size, device=scores.device) >= k[:, None], -torch.inf)
    mass = ranked.double().softmax(dim=-1)
    before = mass.cumsum(dim=-1) - mass
    ranked = ranked.masked_fill((before >= p[:, None]) & (p[:, None] < 1), -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ranked)
