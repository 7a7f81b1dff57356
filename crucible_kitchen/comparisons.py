"""What a row of comparisons says, whatever its fields are called: a prompt, the answer preferred, and the other one.

It knows the schemas of the field's preference datasets, no tokenizer and no file.
Read next: ``crucible_kitchen.pairs``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from crucible_kitchen.errors import RowError
from crucible_kitchen.rows import Example, check_fields, messages_of, shape_hint, text_of
from crucible_kitchen.types import Message, Row

__all__ = ["COMPARISON_FIELDS", "KNOWN_COMPARISONS", "Comparison", "Flaw", "KnownDataset", "Verdict", "read_comparison"]

COMPARISON_FIELDS = ("prompt", "chosen", "rejected", "completion", "label", "system")
"""What ``DataConfig.fields`` can map for comparisons."""

_PROMPTS = ("prompt", "question", "instruction")
_HELPSTEER = {"context", "response1", "response2", "overall_preference"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Flaw(StrEnum):
    """Why a row is no comparison to learn from."""

    EMPTY_SIDE = "an empty side"
    EQUAL_SIDES = "equal sides"
    TIE = "no preference"
    UNLIKE_PROMPTS = "sides that answer different prompts"
    NO_ANSWER = "a side that does not end with an answer"
    TOO_LONG = "a side longer than the longest sequence allowed"
    EQUAL_ONCE_CUT = "sides that are equal once cut at the longest sequence allowed"


@dataclass(frozen=True, slots=True)
class KnownDataset:
    """A public dataset that can be asked for by a short name.

    Attributes:
        hub_id: its address on the hub.
        train: its split to train on.
        held_out: its split to evaluate on.
        options: of the dataset store.
    """

    hub_id: str
    train: str = "train"
    held_out: str = "test"
    options: Mapping[str, str] = field(default_factory=dict)


KNOWN_COMPARISONS: Mapping[str, KnownDataset] = {
    "hhh": KnownDataset("Anthropic/hh-rlhf"),
    "ultrafeedback": KnownDataset("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs"),
    "helpsteer3": KnownDataset("nvidia/HelpSteer3", held_out="validation", options={"config": "preference"}),
}
"""Short names of ``dataset`` in preference learning."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt; the examples differ in their last assistant message or completion only."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer, and whether it is wanted: a row that is not paired."""

    answer: Example
    desirable: bool


def read_comparison(row: Row, fields: Mapping[str, str], index: int = 0) -> Comparison | Verdict | Flaw:
    """Find out what a row compares.

    Shapes, in the order in which they are looked for:

    - ``context`` (messages), ``response1``, ``response2``, ``overall_preference``: below 0 the first is better, above 0
      the second (HelpSteer3).
    - ``chosen`` and ``rejected``, each a text or a list of messages, with a ``prompt`` (or ``question``,
      ``instruction``; text or messages) and perhaps a ``system`` text. Lists may be whole conversations that begin with
      the prompt (UltraFeedback), and then need none. Texts without a prompt are transcripts of ``Human:`` and
      ``Assistant:`` (HHH).
    - ``prompt``, ``completion`` and ``label`` (true, false, 1, 0): one answer, wanted or not.

    ``fields`` maps our names (``COMPARISON_FIELDS``) to the row's.

    Raises:
        ConfigError: ``fields`` maps a name that is none of ours.
        RowError: a field is missing or of the wrong kind.
    """
    check_fields(fields, COMPARISON_FIELDS)
    if not fields and row.keys() >= _HELPSTEER:
        return _rated(row, index)
    chosen, rejected = fields.get("chosen", "chosen"), fields.get("rejected", "rejected")
    if chosen in row or rejected in row:
        return _compared(_side(row, chosen, fields, index), _side(row, rejected, fields, index), index)
    label = fields.get("label", "label")
    if label in row:
        return _judged(row, fields, label, index)
    raise RowError(index, chosen, "is missing", hint=shape_hint(row))


def _rated(row: Row, index: int) -> Comparison | Flaw:
    preference = row["overall_preference"]
    if not isinstance(preference, (int, float)) or isinstance(preference, bool):
        raise RowError(index, "overall_preference", f"should be a number, is {type(preference).__name__}")
    context = messages_of(row, "context", index)
    first, second = ((*context, Message("assistant", text_of(row, f"response{n}", index))) for n in (1, 2))
    if preference == 0:
        return Flaw.TIE
    return _compared(first, second, index) if preference < 0 else _compared(second, first, index)


def _side(row: Row, key: str, fields: Mapping[str, str], index: int) -> tuple[Message, ...]:
    """Return one side as a conversation; a plain prompt is the message of a user."""
    prompt = _prompt(row, fields, index)
    if isinstance(row.get(key), (list, tuple)):
        messages = messages_of(row, key, index)
        return messages if messages[: len(prompt)] == prompt or _opens(messages) else (*prompt, *messages)
    text = text_of(row, key, index)
    if prompt:
        return (*prompt, Message("assistant", text))
    if not _TURN.match(text):
        raise RowError(index, "prompt", "is missing", hint=shape_hint(row))
    return _transcript(text)


def _opens(messages: tuple[Message, ...]) -> bool:
    """Whether messages are a whole conversation, not only what follows a prompt."""
    return messages[0].role in ("system", "user")


def _prompt(row: Row, fields: Mapping[str, str], index: int) -> tuple[Message, ...]:
    key = fields.get("prompt") or next((name for name in _PROMPTS if name in row), "")
    if not key:
        return ()
    value = row.get(key)
    turns = (
        messages_of(row, key, index)
        if isinstance(value, (list, tuple))
        else (Message("user", text_of(row, key, index)),)
    )
    system = fields.get("system", "system")
    if row.get(system) and turns[0].role != "system":
        turns = (Message("system", text_of(row, system, index)), *turns)
    return turns


def _transcript(text: str) -> tuple[Message, ...]:
    """Take a transcript apart; each turn begins with two line breaks and who speaks."""
    _, *turns = _TURN.split(text)
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return tuple(Message(_ROLES[speaker], said.strip()) for speaker, said in pairs)


def _compared(chosen: tuple[Message, ...], rejected: tuple[Message, ...], index: int) -> Comparison | Flaw:
    if any(side[-1].role != "assistant" or len(side) < 2 for side in (chosen, rejected)):
        return Flaw.NO_ANSWER
    if not chosen[-1].content.strip() or not rejected[-1].content.strip():
        return Flaw.EMPTY_SIDE
    if chosen[:-1] != rejected[:-1]:
        return Flaw.UNLIKE_PROMPTS
    if chosen[-1].content == rejected[-1].content:
        return Flaw.EQUAL_SIDES
    return Comparison(_example(chosen, index), _example(rejected, index))


def _example(side: tuple[Message, ...], index: int) -> Example:
    """Return a conversation as an example; one question and one answer can also be written plainly."""
    if [m.role for m in side] == ["user", "assistant"]:
        return Example(index, prompt=side[0].content, completion=side[1].content)
    return Example(index, messages=side)


def _judged(row: Row, fields: Mapping[str, str], label: str, index: int) -> Verdict | Flaw:
    value = row[label]
    if value not in (True, False):
        raise RowError(index, label, "should be true or false")
    key = fields.get("completion", "completion")
    side = _side(row, key, fields, index)
    if side[-1].role != "assistant" or len(side) < 2:
        return Flaw.NO_ANSWER
    if not side[-1].content.strip():
        return Flaw.EMPTY_SIDE
    return Verdict(_example(side, index), bool(value))
