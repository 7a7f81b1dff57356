"""Port ``llm_client``: chat with a served model, for judges and completers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from crucible_kitchen.types import JsonObject, Message

__all__ = ["ChatReply", "LLMClient"]


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A reply: its text, the parsed value if a schema was asked for, why it ended, tokens used."""

    text: str
    parsed: Any = None
    stop_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


@runtime_checkable
class LLMClient(Protocol):
    """A served chat model. Calls may run concurrently."""

    @property
    def synthetic(self) -> bool:
        """See ``Adapter``."""
        ...

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> ChatReply:
        """Return one reply; with a JSON ``schema`` the reply's ``parsed`` fulfils it.

        Raises:
            BackendUserError: the request was refused, or the reply does not fulfil the schema.
            TransientBackendError, CapacityError: worth trying again.
        """
        ...

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        ...

    async def aclose(self) -> None:
        """See ``Adapter``."""
        ...
