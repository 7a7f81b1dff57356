"""Samples and log-probabilities from a model behind ``/completions``, token ids in and token ids out.

Knows no HTTP. Read next: ``crucible_kitchen_openai.endpoint``.
"""

import hashlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import numpy as np
from pydantic import SecretStr

from crucible_kitchen.errors import (
    BackendError,
    BackendUserError,
    CapabilityError,
    CrucibleError,
    ModelNotFound,
    SessionLost,
)
from crucible_kitchen.hub_tokenizer import load_tokenizer
from crucible_kitchen.ports import Tokenizer
from crucible_kitchen.types import Array, JsonObject, Sampled, SamplingParams
from crucible_kitchen.workers import run_sync
from crucible_kitchen_openai.endpoint import Endpoint, EndpointOptions

__all__ = ["OpenAISampler", "OpenAISamplingClient"]

R = TypeVar("R")


class OpenAISampler:
    """A served model. Made by ``OpenAISamplingClient.open_sampler``.

    Sample ``i`` of a request is a request of its own, with a seed made from (seed, i). The log-probabilities of a
    sample are the service's, which are the model's own before temperature, top-p and top-k; where these change the
    distribution they are NaN: not known, and never taken for something else. At temperature 0 they are 0.
    """

    def __init__(self, endpoint: Endpoint, model: str, tokenizer: Tokenizer) -> None:
        self._endpoint = endpoint
        self._model = model
        self._tokenizer = tokenizer
        self._random = random.Random()
        self._closed = False

    @property
    def version(self) -> int:
        """0: a served model does not change."""
        return 0

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the client was given."""
        return self._tokenizer

    async def sample(self, prompt: Sequence[int], params: SamplingParams, n: int = 1) -> list[Sampled]:
        """See ``Sampler``.

        Raises:
            CapabilityError: the service gives no token ids, or cannot tell what is asked for beyond the usual.
        """
        if not prompt or params.max_tokens < 1 or n < 1:
            raise BackendUserError("a request needs a prompt, and max_tokens and n of 1 or more")
        _check_usual(params)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        bodies = [self._body(prompt, params, _seed(seed, number)) for number in range(n)]

        async def one(body: JsonObject) -> Sampled:
            return _sampled(await self._post(body), params)

        return await _all(one, bodies)

    async def compute_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Array]:
        """See ``Sampler``.

        Raises:
            CapabilityError: the service does not echo log-probabilities of prompts.
        """

        async def one(sequence: Sequence[int]) -> Array:
            body = {"model": self._model, "prompt": list(map(int, sequence))}
            options = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 1.0}
            return _echoed(await self._post(body | options), len(sequence))

        return await _all(one, list(sequences))

    async def score(self, sequences: Sequence[Sequence[int]]) -> Array:
        """Refuse: the service gives log-probabilities, not the numbers of a value head."""
        del sequences
        raise CapabilityError(
            "a completions service has no value head to score with",
            hint="judge with llm_client, or open the reward model in a training session with value_head=True",
        )

    async def aclose(self) -> None:
        """Refuse all further requests."""
        self._closed = True

    async def _post(self, body: JsonObject) -> JsonObject:
        if self._closed:
            raise SessionLost("the sampler is closed")
        answer = await self._endpoint.post("/completions", body)
        try:
            choice = answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise BackendError("the service's answer has no choice", hint="check base_url") from error
        if not isinstance(choice, dict):
            raise BackendError("the service's answer has no choice", hint="check base_url")
        return choice

    def _body(self, prompt: Sequence[int], params: SamplingParams, seed: int) -> JsonObject:
        body: JsonObject = {
            "model": self._model,
            "prompt": [int(token) for token in prompt],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
        }
        if params.stop:
            body["stop"] = list(params.stop)
        if params.top_k:
            body["top_k"] = params.top_k
        return body


def _seed(seed: int, number: int) -> int:
    """Return a 31-bit seed that differs for every (seed, number), the same everywhere."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big") >> 1


async def _all(call: Callable[[Any], Awaitable[R]], items: Sequence[Any]) -> list[R]:
    """Call for all items at once and return the results in order; the first error is raised as it is."""
    results: list[Any] = [None] * len(items)
    failures: list[CrucibleError] = []

    async def one(number: int, item: Any) -> None:
        try:
            results[number] = await call(item)
        except CrucibleError as error:
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for number, item in enumerate(items):
            group.start_soon(one, number, item)
    if failures:
        raise failures[0]
    return results


def _check_usual(params: SamplingParams) -> None:
    """Refuse what a service of this interface does not promise."""
    asked = [n for n in ("raw_logprobs", "top_logprobs", "prompt_logprobs", "rescore") if getattr(params, n)]
    asked += ["mode"] if params.mode != "fast" else []
    if asked:
        raise CapabilityError(f"the service cannot sample with {', '.join(asked)}", hint="sample locally")


def _sampled(choice: JsonObject, params: SamplingParams) -> Sampled:
    ids, stated = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(ids, list):
        raise CapabilityError(
            "the service gives no token ids", hint="serve the model with vLLM, which knows return_token_ids"
        )
    tokens = np.asarray(ids, dtype=np.int64)
    unprocessed = params.temperature == 1 and params.top_p >= 1 and not params.top_k
    if params.temperature == 0:
        logprobs = np.zeros(len(tokens), np.float32)
    elif unprocessed and isinstance(stated, list) and len(stated) == len(tokens):
        logprobs = np.asarray(stated, dtype=np.float32)
    else:
        logprobs = np.full(len(tokens), np.nan, np.float32)
    text = str(choice.get("text", ""))
    return Sampled(tokens, logprobs, text, "length" if choice.get("finish_reason") == "length" else "stop")


def _echoed(choice: JsonObject, length: int) -> Array:
    stated = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(stated, list) or len(stated) != length:
        raise CapabilityError(
            "the service does not echo one log-probability per prompt token",
            hint="serve the model with something that knows echo=true, for instance vLLM",
        )
    return np.asarray(stated[1:], dtype=np.float32)


class OpenAISamplingClient:
    """The models that one service serves for sampling: teachers, judges' policies, models in production.

    Args:
        base_url: up to and including the version, for instance ``http://127.0.0.1:8000/v1``.
        tokenizer: the directory or hub id of the models' tokenizer (needs transformers), or a ``Tokenizer``.
        api_key: the bearer token, if one is needed; never shown.
        timeout: seconds that one attempt may take.
        max_concurrency: requests under way at once.
        retries: attempts after the first.
        max_delay: longest wait between attempts, seconds.

    Raises:
        ConfigError: an option has no such value.
    """

    synthetic = False

    def __init__(
        self,
        *,
        base_url: str,
        tokenizer: str | Tokenizer | None = None,
        api_key: SecretStr | str | None = None,
        timeout: float = 120.0,
        max_concurrency: int = 16,
        retries: int = 4,
        max_delay: float = 30.0,
    ) -> None:
        self._tokenizer = tokenizer
        self._endpoint = Endpoint(EndpointOptions.of(base_url, api_key, timeout, max_concurrency, retries, max_delay))

    @asynccontextmanager
    async def open_sampler(self, model: str) -> AsyncGenerator[OpenAISampler, None]:
        """Open a sampler of a served model.

        Raises:
            CapabilityError: the client was given no tokenizer.
            ModelNotFound: on entering, the service does not list the model.
        """
        if self._tokenizer is None:
            raise CapabilityError(
                "sampling needs the model's tokenizer", hint="set tokenizer= to its directory or hub id"
            )
        await self._check_served(model)
        tokenizer = self._tokenizer
        if isinstance(tokenizer, str):
            tokenizer = self._tokenizer = await run_sync(load_tokenizer, tokenizer)
        sampler = OpenAISampler(self._endpoint, model, tokenizer)
        try:
            yield sampler
        finally:
            await sampler.aclose()

    def public_options(self) -> JsonObject:
        """Return the options without the key."""
        name = self._tokenizer if isinstance(self._tokenizer, str) else type(self._tokenizer).__name__
        return {"tokenizer": name, **self._endpoint.options.public()}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._endpoint.aclose()

    async def _check_served(self, model: str) -> None:
        listed = (await self._endpoint.get("/models")).get("data") or []
        names = [str(entry.get("id")) for entry in listed if isinstance(entry, dict)]
        if model not in names:
            raise ModelNotFound(f"the service has no model {model!r}", hint=f"models: {', '.join(names[:8])}")
