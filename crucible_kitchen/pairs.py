"""Comparisons become tokens: answers side by side, flawed rows left out and counted.

Pure: it knows a tokenizer and the data part of a config, no dataset store and no model. Read next:
``crucible_kitchen.stages.preference``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crucible_kitchen.comparisons import Comparison, Flaw, Verdict, read_comparison
from crucible_kitchen.config import DataConfig
from crucible_kitchen.errors import RowError
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.rendering import Rendered, TokenizedDataset, render
from crucible_kitchen.rows import Example
from crucible_kitchen.types import Datum, Row

__all__ = ["Answers", "PairConfig", "render_answers"]


class PairConfig(DataConfig):
    """Which comparisons are trained on, and how they become tokens."""

    on_bad_pair: Literal["drop", "error"] = "drop"
    """What happens to a comparison that nothing can be learned from (an empty side, equal sides, a tie, sides that
    answer different prompts): left out and counted by reason, or refused."""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Answers as tokens: those of one comparison follow each other, the chosen one first.

    Attributes:
        tokens: prompt and answer of each; the answer's tokens are those that count.
        desirable: bool [answers], whether each is wanted; chosen ones are.
        group: answers of one unit that is drawn into a batch: 2 for pairs, 1 for single answers.
        flaws: how many rows were left out, by reason.
    """

    tokens: TokenizedDataset
    desirable: NDArray[np.bool_]
    group: int
    flaws: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of units: pairs, or single answers."""
        return len(self.tokens) // self.group

    def datums(self, unit: int) -> list[Datum]:
        """Return a unit's answers as datums."""
        return [self.tokens.datum(i) for i in range(unit * self.group, (unit + 1) * self.group)]

    def mismatched(self, i: int) -> Datum:
        """Return the prompt of single answer ``i`` with the answer of the next row that has another prompt.

        KTO's reference point is estimated on these. Where all rows have one prompt, the answer is its own.
        """
        own = self.tokens.datum(i)
        prompt = own.inputs["tokens"][: _answer_begins(own)]
        for step in range(1, len(self.tokens)):
            other = self.tokens.datum((i + step) % len(self.tokens))
            begins = _answer_begins(other)
            if not np.array_equal(other.inputs["tokens"][:begins], prompt):
                whole = np.append(other.inputs["tokens"], other.loss_inputs["target_tokens"][-1])
                tokens = np.concatenate([prompt, whole[begins:]])[: self.tokens.longest]
                return Datum.from_tokens(tokens, np.arange(len(tokens)) >= len(prompt), own.key)
        return own

    @classmethod
    def join(cls, parts: Sequence["Answers"]) -> "Answers":
        """Return the parts, in this order, as one; at least one part."""
        flaws: Counter[str] = Counter()
        for part in parts:
            flaws.update(part.flaws)
        desirable = np.concatenate([part.desirable for part in parts])
        return cls(TokenizedDataset.join([part.tokens for part in parts]), desirable, parts[0].group, dict(flaws))


def _answer_begins(datum: Datum) -> int:
    """Return the place of the answer's first token in the whole sequence."""
    return int(np.flatnonzero(datum.loss_inputs["weights"])[0]) + 1


def render_answers(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    config: PairConfig,
    *,
    paired: bool,
    first: int = 0,
    split: str = "train",
    context_length: int = 0,
) -> Answers:
    """Render rows of comparisons; call it in a worker, chunk by chunk, and ``join`` the parts.

    Args:
        rows: a chunk of a dataset.
        tokenizer: the model's.
        config: how they are rendered.
        paired: whether pairs are wanted, else single answers: then a pair counts as two.
        first: index of the first row in its dataset.
        split: of the keys.
        context_length: the model's own limit in tokens; 0 for none.

    Raises:
        RowError: a row cannot be read, is of the other kind, or has a flaw while ``on_bad_pair`` is ``error``.
        SequenceTooLong: an answer is longer than allowed and ``on_too_long`` is ``error``.
    """
    kept: list[tuple[int, Rendered]] = []
    desirable: list[bool] = []
    flaws: Counter[str] = Counter()
    for index, row in enumerate(rows, first):
        found = read_comparison(row, config.fields, index)
        sides = found if isinstance(found, Flaw) else _rendered(found, tokenizer, config, context_length, paired)
        if isinstance(sides, Flaw):
            if config.on_bad_pair == "error" and sides is not Flaw.TOO_LONG:
                raise RowError(index, "chosen", f"has {sides}", hint="on_bad_pair=drop leaves such rows out")
            flaws[str(sides)] += 1
            continue
        for wanted, side in sides:
            kept.append((index, side))
            desirable.append(wanted)
    tokens = TokenizedDataset.of(split, kept)
    return Answers(tokens, np.array(desirable, np.bool_), 2 if paired else 1, dict(flaws))


def _rendered(
    found: Comparison | Verdict, tokenizer: Tokenizer, config: DataConfig, context_length: int, paired: bool
) -> list[tuple[bool, Rendered]] | Flaw:
    """Return the answers as tokens, each with whether it is wanted."""
    if isinstance(found, Verdict) and paired:
        raise RowError(
            found.answer.row, "rejected", "is missing: this loss compares pairs", hint="loss=kto takes single answers"
        )
    sides = [
        (wanted, render(example, tokenizer, config, context_length=context_length))
        for wanted, example in _examples(found)
    ]
    whole = [(wanted, side) for wanted, side in sides if side is not None]
    if len(whole) < len(sides):
        return Flaw.TOO_LONG
    if len(whole) == 2 and whole[0][1].tokens == whole[1][1].tokens:
        return Flaw.EQUAL_ONCE_CUT
    return whole


def _examples(found: Comparison | Verdict) -> list[tuple[bool, Example]]:
    if isinstance(found, Verdict):
        return [(found.desirable, found.answer)]
    return [(True, found.chosen), (False, found.rejected)]
