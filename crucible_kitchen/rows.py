"""What a row says, whatever its fields are called: a conversation, a prompt and completion, or running text.

It knows the shapes that datasets of the field have, no tokenizer and no file.
Read next: ``crucible_kitchen.rendering``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crucible_kitchen.errors import ConfigError, RowError
from crucible_kitchen.types import Message, Row

__all__ = ["FIELDS", "PAIRS", "ROLES", "Example", "check_fields", "messages_of", "read_row", "shape_hint", "text_of"]

PAIRS = (
    ("prompt", ("completion", "response")),
    ("instruction", ("response", "output")),
    ("input", ("output",)),
    ("question", ("answer",)),
)
"""Names of a prompt, and of the completions that go with it, in the order in which they are looked for."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names of the roles."""

FIELDS = ("messages", "prompt", "completion", "text", "context", "labels")
"""What ``DataConfig.fields`` can map."""


@dataclass(frozen=True, slots=True)
class Example:
    """What a row says, whatever its fields were called.

    Attributes:
        row: index of the row, for messages of errors.
        messages: a conversation; empty if the row is none.
        prompt: of a prompt and completion.
        completion: what is to be learned: the completion, or the whole text of a row that has text only.
        labels: the candidate answers, if the row names them.
        is_text: the row is running text: there is no prompt.
    """

    row: int
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    labels: tuple[str, ...] = ()
    is_text: bool = False


def read_row(row: Row, fields: Mapping[str, str], index: int = 0) -> Example:
    """Find out what a row says.

    Shapes, in the order in which they are looked for: ``messages`` (role, content) or ``conversations`` (ShareGPT's
    from, value, or role, content); prompt and completion under the names of ``PAIRS``, where a prompt and completion
    may be lists of messages and an ``instruction`` may have an ``input`` or ``context``; ``text``. ``labels`` beside
    any of them names candidate answers. ``fields`` maps our names (``FIELDS``) to the row's and wins over its shape.

    Raises:
        ConfigError: ``fields`` maps a name that is none of ours.
        RowError: a field is missing or of the wrong kind.
    """
    check_fields(fields, FIELDS)
    labels = _labels(row, fields, index)
    conversation = _conversation_key(row, fields)
    if conversation is not None:
        return Example(index, messages=messages_of(row, conversation, index), labels=labels)
    pair = _pair_keys(row, fields)
    if pair is not None:
        return _pair(row, *pair, fields.get("context", ""), index, labels)
    key = fields.get("text", "text")
    if key not in row and "text" not in fields:
        raise RowError(index, _first_missing(row), "is missing", hint=shape_hint(row))
    return Example(index, completion=text_of(row, key, index), labels=labels, is_text=True)


def check_fields(fields: Mapping[str, str], known: Sequence[str]) -> None:
    """Check that the config key ``fields`` maps names of ours only.

    Raises:
        ConfigError: it maps something else.
    """
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(f"config key 'fields' maps {unknown[0]!r}", hint=f"what can be mapped: {', '.join(known)}")


def _conversation_key(row: Row, fields: Mapping[str, str]) -> str | None:
    """Return the name of a row's conversation, or None if it is not of this shape."""
    if "messages" in fields:
        return fields["messages"]
    if {"prompt", "completion", "text"} & set(fields):
        return None
    return next((key for key in ("messages", "conversations") if key in row), None)


def _pair_keys(row: Row, fields: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the names of a row's prompt and completion, or None if it is not of this shape."""
    if "prompt" in fields or "completion" in fields:
        usual = next(((p, c) for p, cs in PAIRS for c in cs if p in row or c in row), ("prompt", "completion"))
        return fields.get("prompt", usual[0]), fields.get("completion", usual[1])
    if "text" in fields:
        return None
    return next(((p, c) for p, cs in PAIRS for c in cs if p in row and c in row), None)


def _pair(row: Row, prompt: str, completion: str, context: str, index: int, labels: tuple[str, ...]) -> Example:
    if isinstance(row.get(prompt), list) and isinstance(row.get(completion), list):
        messages = messages_of(row, prompt, index) + messages_of(row, completion, index)
        return Example(index, messages=messages, labels=labels)
    text = text_of(row, prompt, index)
    usual = ("input", "context") if prompt == "instruction" else ()
    context = context or next((key for key in usual if row.get(key)), "")
    if context and row.get(context):
        text = f"{text}\n\n{text_of(row, context, index)}"
    return Example(index, prompt=text, completion=text_of(row, completion, index), labels=labels)


def text_of(row: Row, key: str, index: int) -> str:
    """Return a field that has to be text.

    Raises:
        RowError: it is missing or something else.
    """
    if key not in row or row[key] is None:
        raise RowError(index, key, "is missing", hint=shape_hint(row))
    if not isinstance(row[key], str):
        raise RowError(index, key, f"should be text, is {type(row[key]).__name__}", hint=shape_hint(row))
    return str(row[key])


def _labels(row: Row, fields: Mapping[str, str], index: int) -> tuple[str, ...]:
    """Return a row's candidate answers; a field that is only called ``labels`` and is something else is left alone."""
    value = row.get(fields.get("labels", "labels"))
    if isinstance(value, (list, tuple)) and all(isinstance(label, str) for label in value):
        return tuple(value)
    if "labels" in fields:
        raise RowError(index, fields["labels"], "should be a list of texts, the candidate answers")
    return ()


def messages_of(row: Row, key: str, index: int) -> tuple[Message, ...]:
    """Return a field that has to be a list of messages: role and content, or ShareGPT's from and value.

    Raises:
        RowError: it is missing, empty or something else.
    """
    turns = row.get(key)
    if turns is None:
        raise RowError(index, key, "is missing", hint=shape_hint(row))
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowError(index, key, "should be a list of one or more messages")
    return tuple(_message(turn, f"{key}[{place}]", index) for place, turn in enumerate(turns))


def _message(turn: Any, where: str, index: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(index, where, f"should be an object with role and content, is {type(turn).__name__}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    for key in (role_key, content_key):
        if not isinstance(turn.get(key), str):
            kind = type(turn[key]).__name__ if turn.get(key) is not None else "missing"
            raise RowError(index, f"{where}.{key}", f"should be text, is {kind}")
    role = str(turn[role_key])
    return Message(ROLES.get(role, role), str(turn[content_key]))


def _first_missing(row: Row) -> str:
    """Return the field whose absence makes a row unreadable: the other half of a pair, else ``prompt``."""
    for prompt, completions in PAIRS:
        if prompt in row:
            return completions[0]
        if completions[0] in row:
            return prompt
    return "prompt"


def shape_hint(row: Row) -> str:
    """Return what to do about a row that cannot be read: its fields' names, never their values."""
    names = ", ".join(sorted(str(key) for key in row)[:12]) or "none"
    return f"the row's fields: {names}; fields={{...}} says which of them is meant, or fix the row"
