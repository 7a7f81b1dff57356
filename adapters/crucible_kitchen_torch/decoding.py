"""Samples being decoded together: prompts are read, rows join and leave, every advance is one token for every row.

Knows models and weights, not who waits. Read next: ``drawing.py``, ``kvcache.py``, and ``sampling.py``, which feeds it.

Letters: R rows, P distinct prompts, S positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from crucible_kitchen.types import Sampled, SamplingParams
from crucible_kitchen_torch.drawing import Draws, draw
from crucible_kitchen_torch.kvcache import Slots, prompt_cache, read_cache
from crucible_kitchen_torch.threads import enough_threads, mean_matrix
from crucible_kitchen_torch.trainer import Trainer
from crucible_kitchen_torch.weights import Snapshot

__all__ = ["FIXED_ROWS", "Decoding", "Job", "capacity"]

FIXED_ROWS = 16
"""Rows of a batch in deterministic mode."""

SMALLEST_CAPACITY = 128
"""Fewest columns of a batch in deterministic mode."""

PADDING = 0.25
"""How much of a group of prompts that are read together may be padding, at most."""


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
    draws: Draws = field(init=False)

    def __post_init__(self) -> None:
        self.draws = Draws(self.params, self.seed, self.index)

    @property
    def width(self) -> int:
        """How many tokens of cache it may need."""
        return len(self.prompt) + self.length

    @property
    def row(self) -> int:
        """The row it has in deterministic mode: a matter of the request, never of what else runs."""
        return (self.seed + self.index) % FIXED_ROWS


def capacity(job: Job) -> int | None:
    """Return how many columns the batch of a job has in deterministic mode, None in fast mode."""
    if job.params.mode == "fast":
        return None
    return 1 << (max(SMALLEST_CAPACITY, job.width) - 1).bit_length()


class _Reading:
    """Some prompts of about the same length, padded on the left, computed some columns a turn.

    Its tensors, [P, S], are made where they are first used, in the lane: long prompts take their time.
    """

    def __init__(self, jobs: dict[tuple[int, ...], list[Job]], cache: Any) -> None:
        self.jobs = jobs
        self.cache = cache
        self.scores: Tensor | None = None
        self.filled = 0
        self.width = max(len(p) for p in jobs)

    @cached_property
    def tokens(self) -> Tensor:
        """What is read."""
        return torch.tensor([[0] * (self.width - len(prompt)) + list(prompt) for prompt in self.jobs])

    @cached_property
    def mask(self) -> Tensor:
        """Where there is no padding."""
        lengths = torch.tensor([len(prompt) for prompt in self.jobs])
        return torch.arange(self.width) >= self.width - lengths[:, None]

    @cached_property
    def positions(self) -> Tensor:
        """The position of each token in its prompt."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    def members(self) -> list[Job]:
        """All samples that wait for these prompts."""
        return [job for jobs in self.jobs.values() for job in jobs]


class Decoding:
    """Samples decoded together; ``advance`` in the lane, the others between two of its calls.

    Args:
        trainer: whose model computes.
        snapshot: with which weights.
        columns: None merges freely (fast mode): rows are packed and as wide as the longest. A number makes every step
            one of ``FIXED_ROWS`` rows and so many columns, and reads every prompt alone (deterministic mode).
    """

    def __init__(self, trainer: Trainer, snapshot: Snapshot, columns: int | None = None) -> None:
        self._trainer = trainer
        self._model = trainer.model
        self._snapshot = snapshot
        self._ends = self._model.facts.end_ids
        self._fixed = columns is not None
        self._device = next(self._model.module.parameters()).device
        self._slots: Slots | None = None
        self._columns = columns or 0
        self._reading: list[_Reading] = []
        self._all: dict[Job, None] = {}
        self._rows: list[Job | None] = [None] * FIXED_ROWS if self._fixed else []
        self._at = [0] * len(self._rows)  # tokens of each row in the cache
        self._scores: Tensor | None = None  # of each row's next token, [R, V]

    @cached_property
    def _matrix(self) -> float:
        return mean_matrix(self._model.module.parameters())

    @property
    def jobs(self) -> list[Job]:
        """All samples that are here and have not been returned, in the order they came."""
        return list(self._all)

    def join(self, jobs: Sequence[Job]) -> None:
        """Take samples in: their prompts are read in the next turns, each once, then every sample has a row."""
        fresh: dict[tuple[int, ...], list[Job]] = {}
        self._all.update(dict.fromkeys(jobs))
        for job in jobs:
            fresh.setdefault(job.prompt, []).append(job)
        for group in self._groups(list(fresh)):
            self._reading.append(_Reading({p: fresh[p] for p in group}, prompt_cache(self._model)))

    def _groups(self, prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Split prompts into groups to read together, those first that came first."""
        if self._fixed:
            return [[p] for p in prompts]
        groups: list[list[tuple[int, ...]]] = []
        for prompt in sorted(prompts, key=len, reverse=True):
            last = groups[-1] if groups else []
            widest = len(last[0]) if last else 0
            fits = (len(last) + 1) * widest <= self._trainer.budget
            if last and fits and len(prompt) >= (1 - PADDING) * widest:
                last.append(prompt)
            else:
                groups.append([prompt])
        place = {prompt: i for i, prompt in enumerate(prompts)}
        return sorted(groups, key=lambda group: min(place[p] for p in group))

    def advance(self) -> list[tuple[Job, Sampled]]:
        """Advance once: read a part of the waiting prompts, then one token for every row. Return what ended."""
        with self._trainer.weights.as_of(self._snapshot), torch.inference_mode(), self._trainer.place.numbers():
            self._drop_cancelled()
            if self._reading:
                self._read(self._reading[0])
            ended = self._step() if any(self._rows) else []
        for job, _ in ended:
            del self._all[job]
        return ended

    def _drop_cancelled(self) -> None:
        gone = [job for job in self._all if job.request.cancelled]
        if not gone:
            return
        for job in gone:
            del self._all[job]
        self._reading = [group for group in self._reading if any(job in self._all for job in group.members())]
        self._leave([row for row, job in enumerate(self._rows) if job is not None and job.request.cancelled])

    def _read(self, group: _Reading) -> None:
        """Compute the next columns of some prompts; after the last, give each sample a row of its own."""
        upto = min(group.filled + max(1, self._trainer.budget // len(group.jobs)), group.width)
        part = slice(group.filled, upto)
        with enough_threads(self._matrix, len(group.jobs) * (upto - group.filled)):
            group.scores, group.cache = self._model.next_scores(
                group.tokens[:, part].to(self._device),
                group.positions[:, part].to(self._device),
                group.mask[:, :upto].to(self._device),
                group.cache,
            )
        group.filled = upto
        if upto == group.width:
            self._reading.remove(group)
            self._seat(group)

    def _seat(self, group: _Reading) -> None:
        """Give the samples of prompts that were read their rows."""
        assert group.scores is not None
        pairs = read_cache(group.cache)
        for prompt, (ids, jobs) in enumerate(group.jobs.items()):
            here = [job for job in jobs if job in self._all]
            if not here:
                continue
            rows = self._new_rows(here)
            self._room().put(rows, pairs, prompt, len(ids), max(job.width for job in here))
            for row in rows:
                self._at[row] = len(ids)
            assert self._scores is not None
            self._scores[torch.tensor(rows, device=self._device)] = group.scores[prompt].to(self._scores.dtype)

    def _new_rows(self, jobs: list[Job]) -> list[int]:
        """Put jobs into rows: their own, or new ones behind all others."""
        scores = self._scores
        if scores is None:
            scores = self._scores = torch.zeros(len(self._rows), self._model.facts.vocab_size, device=self._device)
        if self._fixed:
            for job in jobs:
                self._rows[job.row] = job
            return [job.row for job in jobs]
        first = len(self._rows)
        self._rows += jobs
        self._at += [0] * len(jobs)
        self._scores = torch.cat([scores, scores.new_zeros(len(jobs), scores.shape[1])])
        return list(range(first, len(self._rows)))

    def _room(self) -> Slots:
        """Return the cache."""
        if self._slots is None:
            size = (FIXED_ROWS, self._columns) if self._fixed else (0, 0)
            self._slots = Slots(self._model, *size, fixed=self._fixed)
        return self._slots

    def _step(self) -> list[tuple[Job, Sampled]]:
        """Draw one token per row, let finished rows go, and score the next token of the others."""
        assert self._slots is not None
        with enough_threads(self._matrix, len(self._rows), self._slots.keys_read(len(self._rows))):
            ended = self._draw()
            self._leave([row for row, _ in ended])
            if any(self._rows):
                tokens = torch.tensor([job.draws.tokens[-1] if job else 0 for job in self._rows])
                self._scores = self._slots.step(tokens, torch.tensor(self._at))
                self._at = [at + (job is not None) for at, job in zip(self._at, self._rows, strict=True)]
        return [found for _, found in ended]

    def _draw(self) -> list[tuple[int, tuple[Job, Sampled]]]:
        """Draw one token per row; return the rows that ended with their samples."""
        assert self._scores is not None
        live = [(row, job) for row, job in enumerate(self._rows) if job is not None]
        scores = self._scores
        if len(live) < len(self._rows):
            scores = scores[torch.tensor([row for row, _ in live], device=self._device)]
        draw(scores, [job.draws for _, job in live])
        ended = []
        for row, job in live:
            sampled = self._finished(job)
            if sampled is not None:
                ended.append((row, (job, sampled)))
        return ended

    def _leave(self, rows: list[int]) -> None:
        """Free these rows; in fast mode the last ones move into their places."""
        if self._fixed:
            for row in rows:
                self._rows[row] = None
                self._at[row] = 0
            return
        for row in sorted(rows, reverse=True):
            last = len(self._rows) - 1
            if row != last:
                assert self._slots is not None
                assert self._scores is not None
                self._rows[row], self._at[row] = self._rows[last], self._at[last]
                self._scores[row] = self._scores[last]
                self._slots.move(last, row, self._at[last])
            self._rows.pop()
            self._at.pop()
        if rows and self._scores is not None:
            self._scores = self._scores[: len(self._rows)]
        if not self._rows:
            self._scores = self._slots = None

    def _finished(self, job: Job) -> Sampled | None:
        """Return the sample if it has ended, else None."""
        tokens = job.draws.tokens
        if tokens[-1] in self._ends:
            return self._sampled(job, self._model.tokenizer.decode(tokens[:-1]), "stop")
        text = self._cut(job)
        if text is not None:
            return self._sampled(job, text, "stop")
        if len(tokens) >= job.length:
            return self._sampled(job, self._model.tokenizer.decode(tokens), "length")
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
        tokens = job.draws.tokens
        tail = decode(tokens[-(max(len(s.encode()) for s in stops) + 8) :])
        if not any(s in tail for s in stops):
            return None
        text = decode(tokens)
        found = [at for at in (text.find(s) for s in stops) if at >= 0]
        return text[: min(found)] if found else None

    def _sampled(self, job: Job, text: str, reason: Literal["stop", "length"]) -> Sampled:
        drawn, params = job.draws, job.params
        return Sampled(
            tokens=np.array(drawn.tokens, dtype=np.int64),
            logprobs=np.array(drawn.logprobs, dtype=np.float32),
            text=text,
            stop_reason=reason,
            version=self._snapshot.version,
            raw_logprobs=np.array(drawn.raw, dtype=np.float32) if params.raw_logprobs else None,
            top_tokens=np.array([ids for ids, _ in drawn.top], dtype=np.int64) if params.top_logprobs else None,
            top_logprobs=np.array([p for _, p in drawn.top], dtype=np.float32) if params.top_logprobs else None,
        )
