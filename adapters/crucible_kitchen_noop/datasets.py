"""A dataset store whose rows are made on the spot: a word, and its last letter as a capital.

The toy model can learn that: the answer depends on the last token only.
It writes and reads nothing. Read next: ``crucible_kitchen.ports.dataset_store``.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import anyio.lowlevel

from crucible_kitchen.errors import ConfigError, DatasetNotFound, EmptyDataset
from crucible_kitchen.ports import DatasetSpec
from crucible_kitchen.types import JsonObject, Row

__all__ = ["NoopDataset", "NoopDatasetStore"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = len(_LETTERS) ** 4
_STRIDE = 100_003  # shares no factor with 26, so that every row of every split has a word of its own
_SPLITS = {"train": 64, "validation": 16, "test": 16}


@dataclass(frozen=True)
class NoopDataset:
    """Rows ``{"prompt": "abcd", "completion": "D"}``; see ``Dataset``.

    Attributes:
        name: what it was opened as.
        split: which split it is.
        numbers: the number of each row's word.
    """

    name: str
    split: str
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.numbers)

    async def fingerprint(self) -> str:
        """Return the sha256 of the rows."""
        await anyio.lowlevel.checkpoint()
        digest = hashlib.sha256()
        for number in self.numbers:
            digest.update(json.dumps(_row(number), sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    async def rows(self, indices: Sequence[int]) -> list[Row]:
        """Return rows by index."""
        await anyio.lowlevel.checkpoint()
        return [_row(self.numbers[_checked(index, len(self))]) for index in indices]

    def select(self, indices: Sequence[int]) -> "NoopDataset":
        """Return the dataset of these rows."""
        numbers = tuple(self.numbers[_checked(index, len(self))] for index in indices)
        return NoopDataset(self.name, self.split, numbers)


def _checked(index: int, size: int) -> int:
    if not 0 <= index < size:
        raise IndexError(f"row {index} of {size}")
    return index


def _row(number: int) -> Row:
    word = "".join(_LETTERS[number // 26**place % 26] for place in range(4))
    return {"prompt": word, "completion": word[-1].upper()}


class NoopDatasetStore:
    """Makes a small dataset under any name. The option ``rows`` of a spec sets the size of the training split.

    Args:
        names: the names that exist; empty: all.
    """

    def __init__(self, *, names: Sequence[str] = ()) -> None:
        self._names = tuple(names)

    @property
    def synthetic(self) -> bool:
        """Always: the rows are made up."""
        return True

    async def load(self, spec: DatasetSpec) -> NoopDataset:
        """Make a dataset."""
        await anyio.lowlevel.checkpoint()
        if self._names and spec.name not in self._names:
            raise DatasetNotFound(f"there is no dataset {spec.name!r}", hint=f"datasets: {', '.join(self._names)}")
        if spec.split not in _SPLITS:
            raise DatasetNotFound(f"{spec.name!r} has no split {spec.split!r}", hint=f"splits: {', '.join(_SPLITS)}")
        sizes = {**_SPLITS, "train": _train_rows(spec)}
        first = sum(sizes[split] for split in list(sizes)[: list(sizes).index(spec.split)])
        size = min(sizes[spec.split], spec.limit or sizes[spec.split])
        if size == 0:
            raise EmptyDataset(f"{spec.name!r}, split {spec.split!r}, has no rows")
        start = int.from_bytes(hashlib.sha256(f"{spec.name}:{spec.seed}".encode()).digest()[:4], "big")
        numbers = ((start + _STRIDE * row) % _WORDS for row in range(first, first + size))
        return NoopDataset(spec.name, spec.split, tuple(numbers))

    def public_options(self) -> JsonObject:
        """Return all options; none is secret."""
        return {"names": list(self._names)}

    async def aclose(self) -> None:
        """Nothing is held."""


def _train_rows(spec: DatasetSpec) -> int:
    options = dict(spec.options)
    text = options.pop("rows", str(_SPLITS["train"]))
    if options:
        raise ConfigError(f"unknown dataset options {sorted(options)}", hint="the toy dataset has one option: rows")
    if not text.isdecimal() or int(text) > 100_000:
        raise ConfigError(f"dataset option rows={text!r} is not a number from 0 to 100000")
    return int(text)
