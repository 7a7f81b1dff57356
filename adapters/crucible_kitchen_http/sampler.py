"""A sampler on a server.

Requests have numbers, so that one whose reply was lost is asked for again and not drawn twice. Knows no training. Read
next: ``crucible_kitchen_http.batches``.
"""

from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np

from crucible_kitchen.errors import BackendError, BackendUserError, CapabilityError, CrucibleError, SessionLost
from crucible_kitchen.ports import Tokenizer
from crucible_kitchen.types import Array, JsonObject, Sampled, SamplingParams
from crucible_kitchen.workers import run_sync
from crucible_kitchen_http.batches import Batches
from crucible_kitchen_http.endpoint import Endpoint

__all__ = ["HttpSampler"]

_FEW = 4096
"""Tokens that are made arrays of at once; more are in a worker thread."""


class HttpSampler:
    """See ``Sampler``.

    Args:
        endpoint: the server.
        name: of the sampling session.
        tokenizer: the model's.
        version: optimizer steps behind the weights.
        extended: the server knows our extensions.
    """

    def __init__(self, endpoint: Endpoint, name: str, tokenizer: Tokenizer, version: int, *, extended: bool) -> None:
        self._endpoint = endpoint
        self._name = name
        self._tokenizer = tokenizer
        self._version = version
        self._extended = extended
        self._batches = Batches(endpoint, name)
        self._number = 0
        self._closed = False

    @property
    def version(self) -> int:
        """See ``Sampler``."""
        return self._version

    @property
    def tokenizer(self) -> Tokenizer:
        """See ``Sampler``."""
        return self._tokenizer

    async def sample(self, prompt: Sequence[int], params: SamplingParams, n: int = 1) -> list[Sampled]:
        """See ``Sampler``.

        Raises:
            CapabilityError: the server cannot give what is asked for beyond tokens and log-probabilities.
            SessionLost: the server has lost the weights; get a new sampler.
        """
        if params.max_tokens < 1 or n < 1:
            raise BackendUserError("max_tokens and n must be 1 or more")
        prompt_ids = [int(token) for token in prompt]
        answer = await self._ask(self._body(prompt_ids, params, n))
        if n * params.max_tokens <= _FEW:
            return self._sampled(answer, params, n)
        return await run_sync(self._sampled, answer, params, n)

    async def compute_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Array]:
        """See ``Sampler``."""
        asked = [[int(token) for token in sequence] for sequence in sequences]
        if any(not sequence for sequence in asked):
            raise BackendUserError("a sequence needs at least one token")
        if not self._extended:
            return [await self._prompt_logprobs(sequence) for sequence in asked]
        body = self._body([], SamplingParams(max_tokens=1), 1)
        answer = await self._ask(body | {"crucible": {"score": asked}})
        scores = (answer.get("crucible") or {}).get("scores")
        if not isinstance(scores, list) or [len(s) for s in scores] != [len(s) - 1 for s in asked]:
            raise BackendError("the server's answer does not hold one log-probability per token")
        return [np.asarray(score, np.float32) for score in scores]

    async def score(self, sequences: Sequence[Sequence[int]]) -> Array:  # noqa: ARG002 - the port's signature
        """See ``Sampler``."""
        raise CapabilityError("the wire carries no value heads", hint="score with a reward model that is local")

    async def _prompt_logprobs(self, sequence: list[int]) -> Array:
        """Ask a server without extensions: it scores a prompt while it samples one token."""
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=True)
        found = (await self._ask(self._body(sequence, params, 1))).get("prompt_logprobs")
        if not isinstance(found, list) or len(found) not in (len(sequence), len(sequence) - 1):
            raise CapabilityError("the server does not compute log-probabilities of prompts")
        return np.asarray(found[len(found) - len(sequence) + 1 :], np.float32)

    async def aclose(self) -> None:
        """See ``Sampler``."""
        if not self._closed:
            self._closed = True
            await self._tell("close_sampling_session", {})

    def _body(self, prompt: list[int], params: SamplingParams, n: int) -> JsonObject:
        drawing: JsonObject = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
        }
        if params.seed is not None:
            drawing["seed"] = params.seed
        if params.stop:
            drawing["stop"] = list(params.stop)
        body: JsonObject = {
            "num_samples": n,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": drawing,
            "prompt_logprobs": params.prompt_logprobs,
            "type": "sample",
        }
        more = {name: getattr(params, name) for name in ("mode", "raw_logprobs", "top_logprobs", "rescore")}
        if self._extended:
            return body | {"crucible": more}
        asked = [name for name, value in more.items() if value not in ("fast", False, 0)]
        if asked:
            raise CapabilityError(f"the server cannot sample with {', '.join(asked)}", hint="sample locally")
        return body

    async def _ask(self, body: JsonObject) -> JsonObject:
        if self._closed:
            raise SessionLost("the sampler is closed", hint="get a new one from the session")
        number = self._number
        self._number += 1
        try:
            if self._extended:
                return await self._batches.ask(number, body)
            asked = body | {"sampling_session_id": self._name, "seq_id": number}
            return await self._endpoint.result(str((await self._endpoint.post("asample", asked)).get("request_id")))
        except anyio.get_cancelled_exc_class():
            await self._tell("cancel_future", {"seq_id": number})
            raise

    async def _tell(self, path: str, body: JsonObject) -> None:
        """Tell the server something that it may as well not hear."""
        if not self._extended:
            return
        with anyio.move_on_after(2.0, shield=True):
            try:
                await self._endpoint.post(path, body | {"sampling_session_id": self._name}, patience=0.0)
            except CrucibleError:
                return

    def _sampled(self, answer: JsonObject, params: SamplingParams, n: int) -> list[Sampled]:
        sequences = answer.get("sequences")
        if not isinstance(sequences, list) or len(sequences) != n:
            raise BackendError("the server's answer does not hold the samples that were asked for")
        prompt = answer.get("prompt_logprobs") if params.prompt_logprobs else None
        scored = np.asarray(prompt[1:], np.float32) if isinstance(prompt, list) else None
        return [self._one(sequence, scored) for sequence in sequences]

    def _one(self, told: JsonObject, prompt_logprobs: Array | None) -> Sampled:
        tokens = np.asarray(told.get("tokens", ()), np.int64)
        stated = told.get("logprobs")
        more = told.get("crucible") or {}
        text = more.get("text")
        return Sampled(
            tokens=tokens,
            logprobs=np.full(len(tokens), np.nan, np.float32) if stated is None else np.asarray(stated, np.float32),
            text=self._tokenizer.decode(tokens.tolist()) if text is None else str(text),
            stop_reason="length" if told.get("stop_reason") == "length" else "stop",
            version=self._version,
            raw_logprobs=_array(more.get("raw_logprobs"), np.float32),
            top_tokens=_array(more.get("top_tokens"), np.int64),
            top_logprobs=_array(more.get("top_logprobs"), np.float32),
            prompt_logprobs=prompt_logprobs,
        )


def _array(value: Any, dtype: Any) -> Array | None:
    return None if value is None else np.asarray(value, dtype)
