"""Samplers: requests join and leave a batch that is decoded a few tokens per turn of the lane.

Knows requests and their ends, not how a token is drawn. Read next: ``decoding.py``.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

import anyio
import anyio.abc
import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError, SessionLost
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.types import Array, Datum, Sampled, SamplingParams
from crucible_kitchen_torch.decoding import FIXED_ROWS, Decoding, Job, capacity
from crucible_kitchen_torch.trainer import Trainer
from crucible_kitchen_torch.turns import Turns
from crucible_kitchen_torch.weights import Snapshot

__all__ = ["Limits", "TorchSampler"]

Ended = tuple[Job, Sampled]

_STEPS = 16
"""Tokens per row in one turn of the lane, at most: a turn costs a third of a millisecond, and must stay short."""

_SHARE = 2
"""A sample that has ended is told with the turn, which ends when one has waited a token for so many of its own.

To tell each by itself costs more than it gives: every time the loop takes the interpreter from the lane.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is decoded at once; what exceeds it waits.

    Attributes:
        rows: most samples decoded together in fast mode.
        cache_tokens: most tokens, padding counted, that the key-value cache of a batch is allowed to reach.
    """

    rows: int = 256
    cache_tokens: int = 1 << 16


class _Room:
    """What room a batch has for samples that wait.

    Args:
        key: its capacity; None in fast mode.
        limits: of the sampler.
        here: the samples it has.
        closed: there is none.
    """

    def __init__(self, key: int | None, limits: Limits, here: Sequence[Job], *, closed: bool = False) -> None:
        self._fixed = key is not None
        self._limits = limits
        self._count = len(here)
        self._width = max((job.width for job in here), default=0)
        self._rows = {job.row for job in here}
        self._closed = closed
        self.taken: list[Job] = []

    def take(self, job: Job) -> bool:
        """Give a sample its place; False if there is none, and then none for others behind it either."""
        if self._fixed:
            free = not self._closed and job.row not in self._rows
            self._rows.add(job.row)
            self.taken += [job] if free else []
            return free
        width = max(self._width, job.width)
        fits = self._count < self._limits.rows and (self._count + 1) * width <= self._limits.cache_tokens
        if self._closed or (self._count and not fits):
            self._closed = True
            return False
        self._count, self._width = self._count + 1, width
        self.taken.append(job)
        return True


class _Request:
    """One call of ``sample`` and what is still missing of its answer."""

    def __init__(self, prompt: tuple[int, ...], params: SamplingParams, n: int, length: int, seed: int) -> None:
        self.samples: list[Sampled | None] = [None] * n
        self.jobs = [Job(self, i, prompt, params, length, seed) for i in range(n)]
        self.done = anyio.Event()
        self.progress: anyio.Event | None = None  # of a request that is watched
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
            self.advanced()

    def advanced(self) -> None:
        """Tell whoever watches that there may be more text."""
        if self.progress is not None:
            self.progress.set()


def _lost() -> SessionLost:
    return SessionLost("the sampler was closed while the request was open")


def _deliver(ended: Sequence[Ended]) -> None:
    """Hand out samples; in the event loop."""
    for job, sampled in ended:
        job.request.deliver(job.index, sampled)


class TorchSampler:
    """See ``Sampler``. Weights are those of its snapshot, whatever is trained meanwhile.

    Requests are merged into one batch that they join and leave at any token. ``mode="deterministic"`` puts them into
    batches of a fixed shape instead, where a request's row and columns are its own: the same bits whatever else runs.

    Args:
        trainer: whose model computes.
        snapshot: the weights; the sampler holds them until it is closed.
        turns: the lane of the model.
        group: where the decoding runs.
        limits: how much is decoded at once.
    """

    def __init__(
        self,
        trainer: Trainer,
        snapshot: Snapshot,
        turns: Turns,
        group: anyio.abc.TaskGroup,
        limits: Limits = Limits(),
    ) -> None:
        self._trainer = trainer
        self._snapshot = snapshot
        self._turns = turns
        self._group = group
        self._limits = limits
        self._waiting: list[Job] = []
        self._batches: dict[int | None, Decoding] = {}
        self._watched: set[_Request] = set()
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
        request = await self._submit(prompt, params, n)
        try:
            await request.done.wait()
        finally:
            request.cancelled = not request.done.is_set()
        return await self._complete(request, params)

    async def stream(self, prompt: Sequence[int], params: SamplingParams) -> AsyncGenerator[str, None]:
        """Draw one continuation and yield its text as it grows; put together it is the sample's text.

        What may still change, the first bytes of a character or of a stop text, is held back. Closing the generator
        frees the sample's slot.

        Raises:
            BackendUserError: see ``sample``.
        """
        request = await self._submit(prompt, params, 1)
        self._watched.add(request)
        watched = request.progress = anyio.Event()
        shown = ""
        try:
            while not request.done.is_set():
                await watched.wait()
                watched = request.progress = anyio.Event()
                text = self._certain(request.jobs[0])
                if not request.done.is_set() and text.startswith(shown) and text != shown:
                    yield text[len(shown) :]
                    shown = text
        finally:
            self._watched.discard(request)
            request.cancelled = not request.done.is_set()
        (sample,) = await self._complete(request, params)
        if sample.text != shown:
            yield sample.text[len(shown) :]

    def _certain(self, job: Job) -> str:
        """Return the text of a sample as far as later tokens cannot change it."""
        text = self.tokenizer.decode(list(job.draws.tokens)).rstrip("\ufffd")
        held = max(
            (k for stop in job.params.stop for k in range(1, len(stop) + 1) if text.endswith(stop[:k])), default=0
        )
        return text[: len(text) - held]

    async def _submit(self, prompt: Sequence[int], params: SamplingParams, n: int) -> _Request:
        """Put a request behind all others and see that somebody serves it."""
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
        return request

    async def _complete(self, request: _Request, params: SamplingParams) -> list[Sampled]:
        """Return the samples of a request that is done, with what the training forward pass has to add."""
        if request.error is not None:
            raise request.error
        samples = [s for s in request.samples if s is not None]
        prompt = request.jobs[0].prompt
        if params.rescore:
            scored = await self.compute_logprobs([[*prompt, *s.tokens.tolist()] for s in samples])
            samples = [replace(s, logprobs=p[len(prompt) - 1 :]) for s, p in zip(samples, scored, strict=True)]
        if params.prompt_logprobs:
            (of_prompt,) = await self.compute_logprobs([prompt])
            samples = [replace(s, prompt_logprobs=of_prompt) for s in samples]
        return samples

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
        if params.top_logprobs < 0 or params.mode not in ("fast", "deterministic"):
            raise BackendUserError("top_logprobs must be 0 or more, mode fast or deterministic")
        if params.rescore and (params.temperature != 1 or params.top_p < 1 or params.top_k):
            raise BackendUserError(
                "rescore needs temperature 1 without top_p and top_k",
                hint="the training forward pass knows the model's own distribution only",
            )
        return min(params.max_tokens, facts.context_length - len(prompt))

    async def _serve(self) -> None:
        """Decode until nobody waits; whoever comes meanwhile joins at the next turn."""
        try:
            while True:
                self._admit()
                if not self._batches:
                    return
                for key in list(self._batches):
                    if key in self._batches:  # who closes the sampler meanwhile empties them
                        await self._turn(key)
        finally:
            self._serving = False
            self._fail_all()

    def _admit(self) -> None:
        """Let waiting samples join, the oldest first; one that has no room keeps those behind it waiting.

        In deterministic mode that is those that need the same row, in fast mode all.
        """
        if not self._waiting:
            return
        staying: list[Job] = []
        rooms: dict[int | None, _Room] = {}
        for job in self._waiting:
            if job.request.cancelled:
                continue
            key = capacity(job)
            if key not in rooms:
                rooms[key] = self._room(key)
            if not rooms[key].take(job):
                staying.append(job)
            elif key not in self._batches:
                self._batches[key] = Decoding(self._trainer, self._snapshot, key)
        self._waiting = staying
        for key, room in rooms.items():
            if room.taken:
                self._batches[key].join(room.taken)

    def _room(self, key: int | None) -> "_Room":
        """Return what room there is in the batch of a capacity; none if the caches of others leave none for it."""
        if key in self._batches:
            return _Room(key, self._limits, self._batches[key].jobs)
        fixed = sum(columns for columns in self._batches if columns is not None) * FIXED_ROWS
        closed = key is not None and fixed > 0 and fixed + key * FIXED_ROWS > self._limits.cache_tokens
        return _Room(key, self._limits, (), closed=closed)

    async def _turn(self, key: int | None) -> None:
        """Advance one batch by a turn and hand out what ended; an error ends the requests of all others."""
        batch = self._batches[key]
        jobs, ended = batch.jobs, list[Ended]()
        try:
            await self._turns.one(self._advance, batch, ended)
        except BaseException as error:
            self._batches.pop(key, None)
            _deliver(ended)
            for job in jobs:  # what ended and was not handed out is no longer among the batch's
                job.request.fail(error if isinstance(error, Exception) else _lost())
            if not isinstance(error, Exception):
                raise
            return
        _deliver(ended)
        for request in self._watched:
            request.advanced()
        if not batch.jobs:
            self._batches.pop(key, None)

    def _advance(self, batch: Decoding, ended: list[Ended]) -> None:
        """Decode a token per row in the lane, and more while nobody waits for the turn to end; add what ended."""
        last = _STEPS - 1
        for step in range(_STEPS):
            ended += (now := batch.advance())
            last = min([last, *(step + len(sampled.tokens) // _SHARE for _, sampled in now)])
            if step >= last or not batch.jobs or self._awaited():
                break

    def _awaited(self) -> bool:
        """Return whether somebody waits for what can only be done between two turns; asked in the lane."""
        alone = self._serving and len(self._batches) == 1 and not self._watched
        return not alone or bool(self._waiting) or self._turns.wanted

    async def compute_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Array]:
        """See ``Sampler``."""
        self._check_open()
        if any(len(s) == 0 for s in sequences):
            raise BackendUserError("a sequence needs at least one token")
        datums = [Datum.from_tokens(list(s), [1.0] * len(s)) for s in sequences if len(s) > 1]
        found = iter(await self._turns.all(lambda: self._trainer.forward(datums, self._snapshot), self._check_open))
        return [next(found) if len(s) > 1 else np.zeros(0, dtype=np.float32) for s in sequences]

    async def score(self, sequences: Sequence[Sequence[int]]) -> Array:
        """See ``Sampler``."""
        self._check_open()
        if self._trainer.value is None:
            raise CapabilityError("this model has no value head", hint="open the session with value_head=True")
        if any(len(s) == 0 for s in sequences):
            raise BackendUserError("a sequence needs at least one token")
        datums = [Datum({"tokens": np.asarray(s, dtype=np.int64)}, {}) for s in sequences]
        if not datums:
            return np.zeros(0, dtype=np.float32)
        names = frozenset({"values"})
        work = await self._turns.all(lambda: self._trainer.outputs(datums, names, at=self._snapshot), self._check_open)
        return np.array([values[-1] for values in work.outputs["values"]], dtype=np.float32)

    def _check_open(self) -> None:
        if self.closed:
            raise SessionLost("the sampler is closed", hint="get a new one from the session")

    def _fail_all(self) -> None:
        for job in self._waiting + [job for batch in self._batches.values() for job in batch.jobs]:
            job.request.fail(_lost())
        self._waiting, self._batches = [], {}

    def close(self) -> None:
        """Release the weights and end open requests."""
        if not self.closed:
            self.closed = True
            self._fail_all()
            self._snapshot.release()

    async def aclose(self) -> None:
        """See ``Sampler``."""
        self.close()
