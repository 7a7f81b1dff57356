"""Samplers: requests that wait at the same time are decoded together, a step per turn of the lane.

Knows requests and their ends, not how a token is drawn. Read next: ``decoding.py``.
"""

from collections.abc import Sequence

import anyio
import anyio.abc
import numpy as np

from crucible_kitchen.errors import BackendUserError, SessionLost
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.types import Array, Datum, Sampled, SamplingParams
from crucible_kitchen_torch.decoding import Decoding, Job
from crucible_kitchen_torch.trainer import Snapshot, Trainer
from crucible_kitchen_torch.turns import Turns

__all__ = ["TorchSampler"]

ROWS_AT_ONCE = 256
"""Most samples decoded together."""

CACHE_TOKENS = 1 << 16
"""Most tokens, padding counted, that the key-value cache of one batch is allowed to reach."""


class _Request:
    """One call of ``sample`` and what is still missing of its answer."""

    def __init__(self, prompt: tuple[int, ...], params: SamplingParams, n: int, length: int, seed: int) -> None:
        self.samples: list[Sampled | None] = [None] * n
        self.jobs = [Job(self, i, prompt, params, length, seed) for i in range(n)]
        self.done = anyio.Event()
        self.error: Exception | None = None
        self.cancelled = False

    def deliver(self, index: int, sampled: Sampled) -> None:
        """Take one sample; the last ends the request."""
        self.samples[index] = sampled
        if all(s is not None for s in self.samples):
            self.done.set()

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        if not self.done.is_set():
            self.error = error
            self.done.set()


class TorchSampler:
    """See ``Sampler``. Weights are those of its snapshot, whatever is trained meanwhile."""

    def __init__(self, trainer: Trainer, snapshot: Snapshot, turns: Turns, group: anyio.abc.TaskGroup) -> None:
        self._trainer = trainer
        self._snapshot = snapshot
        self._turns = turns
        self._group = group
        self._waiting: list[Job] = []
        self._decoding: list[Job] = []
        self._serving = False
        self.closed = False

    @property
    def version(self) -> int:
        """See ``Sampler``."""
        return self._snapshot.version

    @property
    def tokenizer(self) -> Tokenizer:
        """See ``Sampler``."""
        return self._trainer.model.tokenizer

    async def sample(self, prompt: Sequence[int], params: SamplingParams, n: int = 1) -> list[Sampled]:
        """See ``Sampler``; near the end of the context fewer than ``max_tokens`` are drawn."""
        self._check_open()
        ids = tuple(int(i) for i in prompt)
        length = self._allowed(ids, params, n)
        seed = params.seed if params.seed is not None else await self._turns.one(self._trainer.rng.next_seed)
        self._check_open()
        request = _Request(ids, params, n, length, seed)
        self._waiting += request.jobs
        if not self._serving:
            self._serving = True
            self._group.start_soon(self._serve)
        try:
            await request.done.wait()
        finally:
            request.cancelled = not request.done.is_set()
        if request.error is not None:
            raise request.error
        return [s for s in request.samples if s is not None]

    def _allowed(self, prompt: tuple[int, ...], params: SamplingParams, n: int) -> int:
        """Return how many tokens may be drawn.

        Raises:
            BackendUserError: the request cannot be served.
        """
        facts = self._trainer.model.facts
        if not prompt or len(prompt) >= facts.context_length:
            raise BackendUserError(f"a prompt has 1 to {facts.context_length - 1} tokens, got {len(prompt)}")
        if min(prompt) < 0 or max(prompt) >= facts.vocab_size:
            raise BackendUserError(f"the prompt has a token outside the vocabulary of {facts.vocab_size}")
        if params.max_tokens < 1 or n < 1:
            raise BackendUserError(f"max_tokens and n must be 1 or more, got {params.max_tokens} and {n}")
        if params.temperature < 0 or not 0 < params.top_p <= 1 or params.top_k < 0:
            raise BackendUserError("temperature and top_k must be 0 or more, top_p above 0 and at most 1")
        return min(params.max_tokens, facts.context_length - len(prompt))

    async def _serve(self) -> None:
        """Decode batches until nobody waits."""
        try:
            while jobs := self._take():
                self._decoding = jobs
                await self._decode(jobs)
        finally:
            self._serving = False
            self._fail_all()

    def _take(self) -> list[Job]:
        """Take the oldest waiting samples that fit into one batch."""
        self._waiting = [job for job in self._waiting if not job.request.cancelled]
        count, width = 0, 0
        for job in self._waiting[:ROWS_AT_ONCE]:
            width = max(width, len(job.prompt) + job.length)
            if count and (count + 1) * width > CACHE_TOKENS:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def _decode(self, jobs: list[Job]) -> None:
        try:
            decoding = Decoding(self._trainer, self._snapshot, jobs)
            while decoding.active:
                for job, sampled in await self._turns.one(decoding.advance):
                    job.request.deliver(job.index, sampled)
        except Exception as error:  # noqa: BLE001 - carried to whoever asked
            for job in jobs:
                job.request.fail(error)

    async def compute_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Array]:
        """See ``Sampler``."""
        self._check_open()
        if any(len(s) == 0 for s in sequences):
            raise BackendUserError("a sequence needs at least one token")
        datums = [Datum.from_tokens(list(s), [1.0] * len(s)) for s in sequences if len(s) > 1]
        found = iter(await self._turns.all(lambda: self._trainer.forward(datums, self._snapshot), self._check_open))
        return [next(found) if len(s) > 1 else np.zeros(0, dtype=np.float32) for s in sequences]

    def _check_open(self) -> None:
        if self.closed:
            raise SessionLost("the sampler is closed", hint="get a new one from the session")

    def _fail_all(self) -> None:
        for job in self._waiting + self._decoding:
            job.request.fail(SessionLost("the sampler was closed while the request was open"))
        self._waiting, self._decoding = [], []

    def close(self) -> None:
        """Release the weights and end open requests."""
        if not self.closed:
            self.closed = True
            self._fail_all()
            self._snapshot.release()

    async def aclose(self) -> None:
        """See ``Sampler``."""
        self.close()
