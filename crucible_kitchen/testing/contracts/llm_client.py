"""The contract of port ``llm_client``: one reply per call, shaped as asked.

Knows no adapter. Read next: ``crucible_kitchen.ports.llm_client``.
"""

from dataclasses import dataclass

import anyio

from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.ports import ChatReply, LLMClient
from crucible_kitchen.testing.contracts.base import Suite, refuses, skip
from crucible_kitchen.types import Message

__all__ = ["LLM_CLIENT", "LLMClientCase"]


@dataclass(frozen=True)
class LLMClientCase:
    """A chat client under test.

    Attributes:
        client: the adapter.
        deterministic: whether the same request gives the same reply.
        secret: a credential that it was given, if any.
    """

    client: LLMClient
    deterministic: bool = True
    secret: str = ""

    @property
    def adapter(self) -> LLMClient:
        """The client."""
        return self.client


LLM_CLIENT: Suite[LLMClientCase] = Suite("llm_client")

_QUESTION = (Message("system", "You are a judge."), Message("user", "Is 2 + 2 = 4?"))
_SCHEMA = {
    "type": "object",
    "properties": {
        "verdict": {"type": "string", "enum": ["yes", "no"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
        "reasons": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["verdict", "score", "reasons"],
    "additionalProperties": False,
}


@LLM_CLIENT
async def a_question_gets_a_reply(case: LLMClientCase) -> None:
    """Text, without a parsed value where no schema was given."""
    reply = await case.client.chat(_QUESTION)
    assert isinstance(reply.text, str), "the reply has no text"
    assert reply.text, "the reply has no text"
    assert reply.parsed is None, "a reply without a schema has a parsed value"
    assert reply.prompt_tokens >= 0, "token counts are negative"
    assert reply.completion_tokens >= 0, "token counts are negative"


@LLM_CLIENT
async def a_schema_is_fulfilled(case: LLMClientCase) -> None:
    """``parsed`` is what was asked for."""
    parsed = (await case.client.chat(_QUESTION, schema=_SCHEMA, seed=1)).parsed
    assert isinstance(parsed, dict), f"parsed is {type(parsed).__name__}"
    assert parsed.keys() == {"verdict", "score", "reasons"}, f"keys {sorted(parsed)}"
    assert parsed["verdict"] in ("yes", "no"), "the verdict is none of the choices"
    assert type(parsed["score"]) is int, "the score is out of range"
    assert 0 <= parsed["score"] <= 10, "the score is out of range"
    assert all(isinstance(reason, str) for reason in parsed["reasons"]), "a reason is not a text"


@LLM_CLIENT
async def the_same_request_gives_the_same_reply(case: LLMClientCase) -> None:
    """With the same seed."""
    if not case.deterministic:
        skip("the service promises no such thing")
    replies = [await case.client.chat(_QUESTION, seed=5, temperature=1.0) for _ in range(2)]
    assert replies[0].text == replies[1].text, "two equal requests got two replies"


@LLM_CLIENT
async def concurrent_calls_get_their_own_replies(case: LLMClientCase) -> None:
    """Nothing is mixed up."""
    if not case.deterministic:
        skip("the service promises no such thing")
    alone = [await case.client.chat([Message("user", f"number {i}")], seed=i) for i in range(4)]
    together: dict[int, ChatReply] = {}

    async def ask(number: int) -> None:
        together[number] = await case.client.chat([Message("user", f"number {number}")], seed=number)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(ask, number)
    for number, reply in enumerate(alone):
        assert together[number].text == reply.text, f"call {number} got another reply in company"


@LLM_CLIENT
async def a_cancelled_call_leaves_the_client_usable(case: LLMClientCase) -> None:
    """The next call is answered."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        await case.client.chat(_QUESTION)
    assert scope.cancelled_caught, "the call could not be cancelled"
    assert (await case.client.chat(_QUESTION)).text, "the client is not usable after a cancelled call"


@LLM_CLIENT
async def a_refused_request_is_an_error_of_the_tree(case: LLMClientCase) -> None:
    """No messages, or no tokens to answer with."""
    with refuses(CrucibleError, what="a chat without messages"):
        await case.client.chat([])
    with refuses(CrucibleError, what="a chat with max_tokens=0"):
        await case.client.chat(_QUESTION, max_tokens=0)


@LLM_CLIENT
async def its_secret_stays_with_it(case: LLMClientCase) -> None:
    """Not in its options and not in its representation."""
    if not case.secret:
        skip("it was given no secret")
    assert case.secret not in f"{case.client!r} {case.client.public_options()}", "the secret can be read"
