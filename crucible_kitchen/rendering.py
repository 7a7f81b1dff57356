"""Rows become tokens: how the model wants them written, and which tokens count in the loss.

Pure: it knows a tokenizer and the data part of a config, no dataset store, no model, no file.
Read next: ``crucible_kitchen.stages.data``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crucible_kitchen.config import DataConfig
from crucible_kitchen.errors import DataError, RowError, SequenceTooLong
from crucible_kitchen.ports.evaluator import EvalExample
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.rows import Example, read_row
from crucible_kitchen.types import Datum, IntArray, Message, Row

__all__ = [
    "Example",
    "Rendered",
    "TokenizedDataset",
    "epoch_order",
    "eval_example",
    "read_row",
    "render",
    "same_tokens",
    "tokenize",
]

_ASSISTANT = "assistant"


class Rendered(NamedTuple):
    """A row as tokens: ids, the weight of each as a target (True counts), and whether it was cut."""

    tokens: list[int]
    weights: list[bool]
    truncated: bool = False


# --- examples to tokens ----------------------------------------------------------------------------------------------


def render(example: Example, tokenizer: Tokenizer, config: DataConfig, *, context_length: int = 0) -> Rendered | None:
    """Write an example as tokens and say which of them count in the loss.

    Plain: ``prefix_ids + encode(prompt) + encode(completion) + eos``, where completion and eos are the assistant's
    part. Chat: the template's tokens; a message's tokens are found by rendering the conversation up to and including
    it, and an assistant's message begins after the generation prompt, so that what is trained is what is sampled.
    What a template puts behind the end token (a line break, say) does not count.

    ``train_on``: ``last_assistant_message`` and ``all_assistant_messages`` count what the assistant says and the end
    token; ``all_messages`` also what the others say, without the role headers; ``all_tokens`` everything. What
    follows the last message that counts is left out. Running text counts as a whole.

    Args:
        example: what the row says.
        tokenizer: the model's.
        config: template, system prompt, ``train_on``, ``max_length``, ``on_too_long``.
        context_length: the model's own limit in tokens; 0 for none.

    Returns:
        Tokens [T + 1] and weights [T + 1], or None if the row is left out (too long, or nothing is left to learn).

    Raises:
        RowError: the conversation has nothing to learn from.
        SequenceTooLong: it is longer than allowed and ``on_too_long`` is ``error``.
        DataError: the chat template does not let messages be told apart.
    """
    if _wants_chat(example, tokenizer, config):
        tokens, weights = _render_chat(_conversation(example, config), tokenizer, config, example.row)
    else:
        tokens, weights = _render_plain(_flattened(example), tokenizer, config)
    if config.train_on == "all_tokens":
        weights = [True] * len(tokens)
    return _fitted(tokens, weights, config, context_length, example.row)


def _wants_chat(example: Example, tokenizer: Tokenizer, config: DataConfig) -> bool:
    if example.is_text or config.template == "plain":
        return False
    return config.template == "chat" or bool(example.messages) or tokenizer.chat


def _conversation(example: Example, config: DataConfig) -> tuple[Message, ...]:
    messages = example.messages or (Message("user", example.prompt), Message(_ASSISTANT, example.completion))
    if config.system_prompt and messages[0].role != "system":
        messages = (Message("system", config.system_prompt), *messages)
    return messages


def _flattened(example: Example) -> Example:
    """Return a conversation of one question and one answer as prompt and completion."""
    if not example.messages:
        return example
    roles = [message.role for message in example.messages]
    if roles not in (["user", _ASSISTANT], ["system", "user", _ASSISTANT]):
        raise RowError(
            example.row,
            "messages",
            f"cannot be written plainly: the roles are {', '.join(roles[:8])}",
            hint="template=plain takes one question and one answer; use template=chat",
        )
    *before, answer = (message.content for message in example.messages)
    return Example(example.row, prompt="\n\n".join(before), completion=answer, labels=example.labels)


def _plain_prompt(example: Example, tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    prompt = f"{config.system_prompt}\n\n{example.prompt}" if config.system_prompt else example.prompt
    return [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]


def _render_plain(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[int], list[bool]]:
    prefix = len(tokenizer.prefix_ids)
    prompt = list(tokenizer.prefix_ids) if example.is_text else _plain_prompt(example, tokenizer, config)
    learned = [*tokenizer.encode(example.completion), tokenizer.eos_id]
    prompt_weight = config.train_on == "all_messages"
    weights = [False] * prefix + [prompt_weight] * (len(prompt) - prefix) + [True] * len(learned)
    return prompt + learned, weights


def _render_chat(
    messages: tuple[Message, ...], tokenizer: Tokenizer, config: DataConfig, row: int
) -> tuple[list[int], list[bool]]:
    everyone = config.train_on in ("all_messages", "all_tokens")
    counted = [i for i, message in enumerate(messages) if everyone or message.role == _ASSISTANT]
    if not counted:
        raise RowError(row, "messages", "has no assistant message to learn from", hint="train_on=all_messages")
    if config.train_on == "last_assistant_message":
        counted = counted[-1:]
    tokens = tokenizer.render_chat(messages[: counted[-1] + 1], generation_prompt=False)
    weights = [False] * len(tokens)
    if config.train_on != "all_tokens":
        for i in counted:
            start, stop = _span(messages, i, tokens, tokenizer, row)
            weights[start:stop] = [True] * (stop - start)
    return tokens, weights


def _span(messages: tuple[Message, ...], i: int, tokens: list[int], tokenizer: Tokenizer, row: int) -> tuple[int, int]:
    """Return where message ``i`` says something: from behind its header to its end token, as [start, stop)."""
    through = tokenizer.render_chat(messages[: i + 1], generation_prompt=False)
    _require_prefix(through, tokens, row, f"writes message {i} differently once other messages follow")
    if messages[i].role == _ASSISTANT:
        before = tokenizer.render_chat(messages[:i], generation_prompt=True) if i else []
        _require_prefix(before, through, row, f"does not write message {i} as the generation prompt opens it")
        start = len(before)
    else:
        silent = (*messages[:i], Message(messages[i].role, ""))
        start = _common_prefix(tokenizer.render_chat(silent, generation_prompt=False), through)
    ends = [place for place in range(start, len(through)) if through[place] == tokenizer.eos_id]
    return start, ends[-1] + 1 if ends else len(through)


def _require_prefix(part: list[int], whole: list[int], row: int, problem: str) -> None:
    if whole[: len(part)] != part:
        raise DataError(
            f"row {row}: the chat template {problem}, so its tokens cannot be told apart",
            hint="use train_on=last_assistant_message or all_tokens, or give a chat_template that only ever appends",
        )


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _fitted(
    tokens: list[int], weights: list[bool], config: DataConfig, context_length: int, row: int
) -> Rendered | None:
    limit = min(config.max_length, context_length) if context_length else config.max_length
    too_long = len(tokens) > limit
    if too_long and config.on_too_long == "error":
        raise SequenceTooLong(
            f"row {row} has {len(tokens)} tokens, more than {limit}",
            hint="on_too_long=truncate or drop, or a greater max_length if the model allows it",
        )
    if too_long and config.on_too_long == "drop":
        return None
    weights = weights[:limit]
    if not any(weights[1:]):  # the first token has nothing before it to be predicted from
        return None
    return Rendered(tokens[:limit], weights, truncated=too_long)


# --- evaluation ------------------------------------------------------------------------------------------------------


def eval_example(
    row: Row, tokenizer: Tokenizer, config: DataConfig, *, index: int = 0, key: str = "", labels: Sequence[str] = ()
) -> EvalExample:
    """Return a row as an evaluator's example: what the model is asked, and what it should answer.

    A conversation is asked for its last assistant message; what follows that is left out. The row's own labels win
    over ``labels``.

    Raises:
        RowError: the row asks nothing.
    """
    example = read_row(row, config.fields, index)
    prompt, reference = _question(example, tokenizer, config)
    return EvalExample(key or f"{config.split}/{index}", tuple(prompt), reference, example.labels or tuple(labels))


def _question(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[int], str]:
    if example.is_text:
        raise RowError(example.row, "prompt", "is missing: a row of running text asks nothing")
    if not _wants_chat(example, tokenizer, config):
        flat = _flattened(example)
        return _plain_prompt(flat, tokenizer, config), flat.completion
    messages = _conversation(example, config)
    last = max((i for i, message in enumerate(messages) if message.role == _ASSISTANT), default=0)
    if not last:
        raise RowError(example.row, "messages", "has no assistant message that answers something")
    return tokenizer.render_chat(messages[:last], generation_prompt=True), messages[last].content


# --- datasets of tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedDataset:
    """Rows as tokens, compactly: 5 bytes a token and 16 a row.

    Attributes:
        split: of the rows' keys.
        tokens: int32 [sum of lengths], all rows one after the other.
        weights: bool, the same shape: which tokens count as targets.
        offsets: int64 [rows + 1], where each row begins.
        row_ids: int64 [rows], index of each row in its dataset.
        truncated: how many rows were cut.
        dropped: how many rows were left out.
    """

    split: str
    tokens: NDArray[np.int32]
    weights: NDArray[np.bool_]
    offsets: IntArray
    row_ids: IntArray
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        """Return the number of rows that were kept."""
        return len(self.row_ids)

    @property
    def token_count(self) -> int:
        """Number of tokens of all rows."""
        return len(self.tokens)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that count as targets."""
        return int(self.weights.sum()) - int(self.weights[self.offsets[:-1]].sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self.offsets).max(initial=0))

    def key(self, i: int) -> str:
        """Return the stable name of a kept row: its split and its index in the dataset, ``train/17``."""
        return f"{self.split}/{self.row_ids[i]}"

    def datum(self, i: int) -> Datum:
        """Return the i-th kept row as a datum."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return Datum.from_tokens(self.tokens[span].astype(np.int64), self.weights[span], self.key(i))

    @classmethod
    def of(cls, split: str, kept: Sequence[tuple[int, Rendered]], *, dropped: int = 0) -> "TokenizedDataset":
        """Return rendered rows, each with its index in the dataset, compactly.

        Args:
            split: of the rows' keys.
            kept: the rows.
            dropped: how many rows were left out.
        """
        return cls(
            split,
            np.array([token for _, item in kept for token in item.tokens], np.int32),
            np.array([weight for _, item in kept for weight in item.weights], np.bool_),
            np.cumsum([0, *(len(item.tokens) for _, item in kept)], dtype=np.int64),
            np.array([index for index, _ in kept], np.int64),
            sum(item.truncated for _, item in kept),
            dropped,
        )

    @classmethod
    def join(cls, parts: Sequence["TokenizedDataset"]) -> "TokenizedDataset":
        """Return the parts, of one split and in this order, as one; at least one part."""
        shifts = np.cumsum([0, *(part.token_count for part in parts)])
        ends = [part.offsets[1:] + shift for part, shift in zip(parts, shifts[:-1], strict=True)]
        return cls(
            parts[0].split,
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.weights for part in parts]),
            np.concatenate([np.zeros(1, np.int64), *ends]),
            np.concatenate([part.row_ids for part in parts]),
            sum(part.truncated for part in parts),
            sum(part.dropped for part in parts),
        )


def tokenize(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    first: int = 0,
    split: str | None = None,
    context_length: int = 0,
) -> TokenizedDataset:
    """Render rows into one compact dataset; call it in a worker, chunk by chunk, and ``join`` the parts.

    Args:
        rows: a chunk of a dataset.
        tokenizer: the model's.
        config: how they are rendered.
        first: index of the first row in its dataset, for keys and messages of errors.
        split: of the keys; unset: the config's.
        context_length: the model's own limit in tokens; 0 for none.

    Raises:
        RowError, SequenceTooLong, DataError: see ``read_row`` and ``render``.
    """
    kept: list[tuple[int, Rendered]] = []
    count = 0
    for index, row in enumerate(rows, first):
        count += 1
        example = read_row(row, config.fields, index)
        rendered = render(example, tokenizer, config, context_length=context_length)
        if rendered is not None:
            kept.append((index, rendered))
    return TokenizedDataset.of(config.split if split is None else split, kept, dropped=count - len(kept))


_PROBE = 'The 12 quick brown foxes, naïve or not, jumped over 3.5 lazy dogs: "¡olé!"\n\tdef f(x): return x**2\n'


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give one text the same ids, as far as a probe of letters, digits, code and signs tells.

    Models of one family may score unequal numbers of ids (padded vocabularies); what is compared is what ids mean.
    """
    return (a.eos_id, a.prefix_ids) == (b.eos_id, b.prefix_ids) and a.encode(_PROBE) == b.encode(_PROBE)


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> IntArray:
    """Return the order of ``n`` rows in an epoch: a permutation drawn from (run seed, epoch), int64 [n]."""
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(n).astype(np.int64)
