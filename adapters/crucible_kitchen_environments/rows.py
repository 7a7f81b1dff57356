"""Problems from rows: a JSONL file or a Hugging Face dataset, with a part that is held out.

A row's part is decided by the hash of its question, so it does not depend on how many rows there are or their order.
It knows no environment. Read next: ``math_problems.py``.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from crucible_kitchen.errors import DatasetNotFound, EmptyDataset, MissingExtra, RowError
from crucible_kitchen.types import Row

__all__ = ["Problems", "first_of", "read_rows"]

T = TypeVar("T")
_PARTS = 20


def read_rows(where: str, split: str) -> list[Row]:
    """Read ``file.jsonl`` or the split of a dataset of the hub.

    Raises:
        DatasetNotFound: there is no such file or dataset.
        RowError: a line is no JSON object.
        MissingExtra: it is no file, and ``datasets`` is not installed.
    """
    if where.endswith((".jsonl", ".json")) or Path(where).exists():
        if not Path(where).is_file():
            raise DatasetNotFound(f"there is no file {where!r}", hint="the path is relative to where you are")
        with Path(where).open(encoding="utf-8") as lines:
            return [_object(i, line) for i, line in enumerate(lines) if line.strip()]
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data") from error
    try:
        return list(datasets.load_dataset(where, split=split))
    except Exception as error:
        raise DatasetNotFound(f"the dataset {where!r}, split {split!r}, cannot be loaded: {error}") from error


def _object(index: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowError(index, "", "the line is no JSON") from error
    if not isinstance(row, dict):
        raise RowError(index, "", "the line is no JSON object")
    return row


def first_of(row: Row, index: int, *names: str) -> Any:
    """Return the first field of these names that a row has.

    Raises:
        RowError: it has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise RowError(index, names[0], "is missing", hint=f"fields that are understood: {', '.join(names)}")


class Problems(Generic[T]):
    """Problems made of rows: a twentieth is held out.

    Args:
        name: for messages.
        rows: gives the rows; called once, when they are first needed.
        made: gives a row's question and problem.
        held_out: take the part that is held out, instead of the rest.

    Raises (when first used):
        EmptyDataset: there is none.
    """

    def __init__(
        self,
        name: str,
        rows: Callable[[], Iterable[Row]],
        made: Callable[[Row, int], tuple[str, T]],
        *,
        held_out: bool = False,
    ) -> None:
        self._name, self._rows, self._made, self.held_out = name, rows, made, held_out
        self._problems: list[tuple[str, T]] | None = None

    @property
    def all(self) -> Sequence[tuple[str, T]]:
        """Questions and problems, in the order of their rows; blocking when first read."""
        if self._problems is None:
            made = [self._made(row, i) for i, row in enumerate(self._rows())]
            self._problems = [pair for pair in made if (_part(pair[0]) == 0) == self.held_out]
            if not self._problems and not self.held_out:
                raise EmptyDataset(f"{self._name} has no problem")
        return self._problems

    def others(self) -> "Problems[T] | None":
        """Return the part that is held out, or None where it is empty or this is it."""
        if self.held_out:
            return None
        other = Problems(self._name, self._rows, self._made, held_out=True)
        return other if other.all else None

    def fingerprint(self) -> str:
        """Return the hash of all questions and problems."""
        digest = hashlib.sha256()
        for question, problem in self.all:
            digest.update(json.dumps([question, repr(problem)]).encode())
        return digest.hexdigest()


def _part(question: str) -> int:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % _PARTS
