"""Sampling from the toy model: real distributions, each request with its own generator.

Knows no session: it holds a copy of the weights. Read next: ``crucible_kitchen_noop.model``.
"""

import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import anyio.lowlevel
import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError, ModelNotFound, SessionLost
from crucible_kitchen.types import Array, Float64Array, JsonObject, Sampled, SamplingParams
from crucible_kitchen_noop.model import BigramModel, log_softmax, token_logprobs
from crucible_kitchen_noop.tokenizer import VOCAB_SIZE, ByteTokenizer

__all__ = ["CONTEXT_LENGTH", "NoopSampler", "NoopSamplingClient"]

CONTEXT_LENGTH = 8192
_TOKENS_BETWEEN_CHECKPOINTS = 64


class NoopSampler:
    """A sampler of one table of logits.

    Args:
        table: [V, V], not changed by anyone from now on.
        version: optimizer steps behind it.
        draw_seed: gives the seed of a request that has none.
        is_open: whether what the sampler belongs to is still open.
        latency: seconds each request takes.
        values: [V], of each token; None without a value head.
    """

    def __init__(
        self,
        table: Float64Array,
        version: int,
        draw_seed: Callable[[], int],
        *,
        is_open: Callable[[], bool] = lambda: True,
        latency: float = 0.0,
        values: Float64Array | None = None,
    ) -> None:
        self._values = values
        self._table = table
        self._version = version
        self._draw_seed = draw_seed
        self._is_open = is_open
        self._latency = latency
        self._closed = False
        self._tokenizer = ByteTokenizer()

    @property
    def version(self) -> int:
        """Optimizer steps behind these weights."""
        return self._version

    @property
    def tokenizer(self) -> ByteTokenizer:
        """The toy model's tokenizer."""
        return self._tokenizer

    async def sample(self, prompt: Sequence[int], params: SamplingParams, n: int = 1) -> list[Sampled]:
        """Draw ``n`` continuations; sample ``i`` draws from ``(seed, i)``."""
        await self._enter()
        if not prompt or len(prompt) >= CONTEXT_LENGTH:
            raise BackendUserError(f"a prompt of {len(prompt)} tokens does not fit a context of {CONTEXT_LENGTH}")
        if params.max_tokens < 1 or n < 1:
            raise BackendUserError(f"max_tokens and n must be 1 or more, got {params.max_tokens} and {n}")
        self._check_tokens(prompt)
        if params.rescore and (params.temperature != 1 or params.top_p < 1 or params.top_k):
            raise BackendUserError("rescore needs temperature 1 without top_p and top_k")
        seed = params.seed if params.seed is not None else self._draw_seed()
        return [await self._continue(prompt, params, np.random.default_rng([abs(seed), i])) for i in range(n)]

    async def compute_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Array]:
        """Return float32 [T] per sequence of T + 1 tokens."""
        await self._enter()
        results: list[Array] = []
        for sequence in sequences:
            self._check_tokens(sequence)
            ids = np.asarray(sequence, dtype=np.int64)
            results.append(token_logprobs(self._table, ids[:-1], ids[1:]).astype(np.float32))
            await anyio.lowlevel.checkpoint()
        return results

    async def score(self, sequences: Sequence[Sequence[int]]) -> Array:
        """Return float32 [N]: the value of each sequence's last token."""
        await self._enter()
        if self._values is None:
            raise CapabilityError("this model has no value head", hint="open the session with value_head=True")
        for sequence in sequences:
            if not sequence:
                raise BackendUserError("a sequence needs at least one token")
            self._check_tokens(sequence)
        return self._values[[sequence[-1] for sequence in sequences]].astype(np.float32)

    async def aclose(self) -> None:
        """Refuse all further requests."""
        self._closed = True

    async def _enter(self) -> None:
        if self._closed or not self._is_open():
            raise SessionLost("the sampler is closed")
        await anyio.sleep(self._latency)

    def _check_tokens(self, ids: Sequence[int]) -> None:
        if not all(0 <= i < self._tokenizer.vocab_size for i in ids):
            raise BackendUserError(f"a token is outside the vocabulary of {self._tokenizer.vocab_size}")

    async def _continue(self, prompt: Sequence[int], params: SamplingParams, rng: np.random.Generator) -> Sampled:
        stops = [stop.encode() for stop in params.stop]
        last, tokens, logprobs, text = prompt[-1], [], [], bytearray()
        reason = "length"
        for count in range(min(params.max_tokens, CONTEXT_LENGTH - len(prompt))):
            if count % _TOKENS_BETWEEN_CHECKPOINTS == 0:
                await anyio.lowlevel.checkpoint()
            last, logprob = _draw(self._table[last], params, rng)
            tokens.append(last)
            logprobs.append(logprob)
            if last < 256:
                text.append(last)
            found = next((stop for stop in stops if text.endswith(stop)), None)
            if last == self._tokenizer.eos_id or found is not None:
                del text[len(text) - len(found or b"") :]
                reason = "stop"
                break
        sample = Sampled(
            np.asarray(tokens, dtype=np.int64),
            np.asarray(logprobs, dtype=np.float32),
            text.decode(errors="replace"),
            "stop" if reason == "stop" else "length",
            self._version,
        )
        return self._with_logprobs(sample, prompt, params)

    def _with_logprobs(self, sample: Sampled, prompt: Sequence[int], params: SamplingParams) -> Sampled:
        """Add the log-probabilities that were asked for beyond the usual ones."""
        ids = np.concatenate([np.asarray(prompt, dtype=np.int64), sample.tokens])
        own = token_logprobs(self._table, ids[:-1], ids[1:]).astype(np.float32)
        raw, of_prompt = own[len(prompt) - 1 :], own[: len(prompt) - 1]
        sample = replace(
            sample,
            logprobs=raw if params.rescore else sample.logprobs,
            raw_logprobs=raw if params.raw_logprobs else None,
            prompt_logprobs=of_prompt if params.prompt_logprobs else None,
        )
        if not params.top_logprobs:
            return sample
        every = log_softmax(self._table[ids[len(prompt) - 1 : -1]])
        best = np.argsort(-every, axis=1, kind="stable")[:, : params.top_logprobs]
        return replace(sample, top_tokens=best, top_logprobs=np.take_along_axis(every, best, axis=1).astype(np.float32))


def _draw(logits: Float64Array, params: SamplingParams, rng: np.random.Generator) -> tuple[int, float]:
    """Draw one token and return it with its log-probability under the processed distribution."""
    if params.temperature == 0:
        return int(np.argmax(logits)), 0.0
    logprobs = log_softmax(logits / params.temperature)
    ranked = np.argsort(-logprobs, kind="stable")
    keep = len(ranked) if params.top_k == 0 else min(params.top_k, len(ranked))
    if params.top_p < 1:
        before = np.cumsum(np.exp(logprobs[ranked])) - np.exp(logprobs[ranked])
        keep = min(keep, max(1, int(np.sum(before < params.top_p))))
    kept = np.sort(ranked[:keep])
    processed = log_softmax(logprobs[kept])
    place = int(np.searchsorted(np.cumsum(np.exp(processed)), rng.random(), side="right"))
    place = min(place, len(kept) - 1)
    return int(kept[place]), float(processed[place])


class NoopSamplingClient:
    """Serves toy models: every name is a model, with weights drawn from the name and the seed.

    Args:
        seed: of all weights and of requests that have no seed.
        models: the names that exist; empty: all.
        latency: seconds each request takes.
    """

    def __init__(self, *, seed: int = 0, models: Sequence[str] = (), latency: float = 0.0) -> None:
        self._seed = int(seed)
        self._models = tuple(models)
        self._latency = float(latency)

    @property
    def synthetic(self) -> bool:
        """Always: nobody trained these weights."""
        return True

    @asynccontextmanager
    async def open_sampler(self, model: str) -> AsyncGenerator[NoopSampler, None]:
        """Open a sampler of a toy model."""
        await anyio.lowlevel.checkpoint()
        if self._models and model not in self._models:
            raise ModelNotFound(f"there is no model {model!r}", hint=f"models: {', '.join(self._models)}")
        name = int.from_bytes(hashlib.sha256(f"{self._seed}:{model}".encode()).digest()[:4], "big")
        seeds = np.random.default_rng([name, 1])
        table = BigramModel(VOCAB_SIZE, name, None).table() * 50.0
        sampler = NoopSampler(table, 0, lambda: int(seeds.integers(2**62)), latency=self._latency)
        try:
            yield sampler
        finally:
            await sampler.aclose()

    def public_options(self) -> JsonObject:
        """Return all options; none is secret."""
        return {"seed": self._seed, "models": list(self._models), "latency": self._latency}

    async def aclose(self) -> None:
        """Nothing is held."""
