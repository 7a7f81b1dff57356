"""Chat with a model behind ``/chat/completions``, with structured output that is really checked.

Knows no HTTP. Read next: ``crucible_kitchen_openai.endpoint``.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import SecretStr

from crucible_kitchen.errors import BackendError, BackendUserError
from crucible_kitchen.ports import ChatReply
from crucible_kitchen.types import JsonObject, Message
from crucible_kitchen_openai.endpoint import Endpoint, EndpointOptions
from crucible_kitchen_openai.schema import check_schema, fulfils

__all__ = ["OpenAILLMClient"]


class OpenAILLMClient:
    """One chat model of one service.

    Args:
        base_url: up to and including the version, for instance ``http://127.0.0.1:8000/v1``.
        model: the service's name for the model.
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
        model: str,
        api_key: SecretStr | str | None = None,
        timeout: float = 120.0,
        max_concurrency: int = 16,
        retries: int = 4,
        max_delay: float = 30.0,
    ) -> None:
        self._model = model
        self._endpoint = Endpoint(EndpointOptions.of(base_url, api_key, timeout, max_concurrency, retries, max_delay))

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> ChatReply:
        """See ``LLMClient``. A schema is sent as ``response_format`` and the reply is checked against it."""
        if not messages or max_tokens < 1:
            raise BackendUserError("a chat needs one message or more, and max_tokens of 1 or more")
        body: JsonObject = {
            "model": self._model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if seed is not None:
            body["seed"] = seed
        if schema is not None:
            check_schema(schema)
            form = {"name": "reply", "schema": dict(schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return _reply(await self._endpoint.post("/chat/completions", body), schema)

    def public_options(self) -> JsonObject:
        """Return the options without the key."""
        return {"model": self._model, **self._endpoint.options.public()}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._endpoint.aclose()


def _reply(answer: JsonObject, schema: Mapping[str, Any] | None) -> ChatReply:
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content")
        reason = str(choice.get("finish_reason") or "stop")
        usage = answer.get("usage") or {}
        used = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BackendError("the service's answer has no choice with a message", hint="check base_url") from error
    if not isinstance(text, str):
        raise BackendUserError("the model gave no text: it refused, or called a tool")
    parsed = None if schema is None else _parsed(text, reason, schema)
    return ChatReply(text, parsed, reason, *used)


def _parsed(text: str, reason: str, schema: Mapping[str, Any]) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        hint = "raise max_tokens" if reason == "length" else "use a model that supports structured output"
        raise BackendUserError("the reply is not JSON", hint=hint) from error
    if not fulfils(value, schema):
        raise BackendUserError(
            "the reply does not fulfil the schema", hint="use a model that supports structured output"
        )
    return value
