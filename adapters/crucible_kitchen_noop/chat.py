"""A chat model that says nothing of worth: replies drawn from the messages and the seed, shaped as asked.

It knows no service. Read next: ``crucible_kitchen.ports.llm_client``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import numpy as np

from crucible_kitchen.errors import BackendUserError
from crucible_kitchen.ports import ChatReply
from crucible_kitchen.types import JsonObject, Message

__all__ = ["NoopLLMClient"]


class NoopLLMClient:
    """Replies deterministically; with a JSON schema it makes a value that fulfils it.

    The schemas it understands: ``type``, ``properties``, ``required``, ``items``, ``minItems``, ``minimum``,
    ``maximum``, ``enum``, ``const``, ``anyOf``, ``oneOf``, ``$ref`` into ``$defs``; any other constraint is refused.

    Args:
        seed: of the replies.
        latency: seconds each call takes.
    """

    def __init__(self, *, seed: int = 0, latency: float = 0.0) -> None:
        self._seed = int(seed)
        self._latency = float(latency)

    @property
    def synthetic(self) -> bool:
        """Always."""
        return True

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,  # noqa: ARG002 - nothing here is drawn twice
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> ChatReply:
        """See ``LLMClient``."""
        await anyio.sleep(self._latency)
        if not messages or max_tokens < 1:
            raise BackendUserError("a chat needs one message or more, and max_tokens of 1 or more")
        text = json.dumps([self._seed, seed, [[m.role, m.content] for m in messages]])
        digest = hashlib.sha256(text.encode()).digest()
        prompt_tokens = sum(len(m.content.split()) for m in messages)
        if schema is None:
            words = f"synthetic reply {digest.hex()[:8]}".split()
            said = " ".join(words[:max_tokens])
            reason = "stop" if max_tokens >= len(words) else "length"
            return ChatReply(said, None, reason, prompt_tokens, min(len(words), max_tokens))
        value = _value(schema, schema, np.random.default_rng(list(digest)))
        return ChatReply(json.dumps(value), value, "stop", prompt_tokens, 1)

    def public_options(self) -> JsonObject:
        """Return all options; none is secret."""
        return {"seed": self._seed, "latency": self._latency}

    async def aclose(self) -> None:
        """Nothing is held."""


_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions"}
_KNOWN = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "integer": {"minimum", "maximum"},
    "number": {"minimum", "maximum"},
    "string": set(),
    "boolean": set(),
    "null": set(),
}


def _value(schema: Mapping[str, Any], root: Mapping[str, Any], rng: np.random.Generator) -> Any:
    """Return a value that fulfils a schema."""
    if "$ref" in schema:
        return _value(_resolve(schema["$ref"], root), root, rng)
    if "const" in schema:
        return schema["const"]
    for choices in ("enum", "anyOf", "oneOf"):
        if choices in schema:
            choice = schema[choices][int(rng.integers(len(schema[choices])))]
            return choice if choices == "enum" else _value(choice, root, rng)
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind not in _KNOWN or (unknown := schema.keys() - _NOTES - {"type"} - _KNOWN[kind]):
        raise BackendUserError(f"the noop model cannot fulfil {sorted(unknown) if kind in _KNOWN else kind!r}")
    if kind == "object":
        return {name: _value(inner, root, rng) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [_value(schema.get("items", {"type": "null"}), root, rng) for _ in range(schema.get("minItems", 1))]
    return _scalar(kind, schema, rng)


def _scalar(kind: str, schema: Mapping[str, Any], rng: np.random.Generator) -> Any:
    low, high = schema.get("minimum"), schema.get("maximum")
    low = low if low is not None else (high - 10 if high is not None else 0)
    high = high if high is not None else low + 10
    if kind == "integer":
        return int(rng.integers(int(np.ceil(low)), int(np.floor(high)) + 1))
    if kind == "number":
        return float(low + (high - low) * rng.random())
    return {"string": f"synthetic {int(rng.integers(1000))}", "boolean": bool(rng.integers(2))}.get(kind)


def _resolve(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Any = root
    try:
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    except (KeyError, TypeError) as error:
        raise BackendUserError(f"the schema has no {reference!r}") from error
    return found  # type: ignore[no-any-return]
