"""The built-in tasks: problems made on the spot, with answers that can be checked.

A task numbers all its problems; a fixed permutation of the numbers gives test, validation and training problems, so
that the splits never share one and a problem is in the same split in every run. It knows no model and no file.
Read next: ``crucible_kitchen.rendering``.
"""

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Protocol

from crucible_kitchen.errors import ConfigError, DatasetNotFound, EmptyDataset
from crucible_kitchen.types import Row

__all__ = ["TASKS", "Parity", "Reverse", "Sort", "Sums", "Task", "TaskRows", "open_task", "permuted"]

_HELD_OUT = 500
_TRAIN = 9_000
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Task(Protocol):
    """A family of problems, numbered from 0, of a chosen difficulty. All methods are pure."""

    @property
    def name(self) -> str:
        """What it is opened as."""
        ...

    @property
    def hardest(self) -> int:
        """The greatest difficulty; 1 is the least."""
        ...

    def size(self, difficulty: int) -> int:
        """Return how many problems there are."""
        ...

    def row(self, number: int, difficulty: int) -> Row:
        """Return one problem: ``prompt``, ``completion``, and ``labels`` if the answer is one of few."""
        ...

    def verify(self, row: Row, answer: str) -> bool:
        """Return whether an answer to a row's prompt is right; space around it does not count."""
        ...

    def wrong_answer(self, row: Row, rng: Random) -> str:
        """Return an answer that is near the right one and wrong, for pairs of preference."""
        ...


class _Exact:
    """What tasks with exactly one right answer share."""

    __slots__ = ()

    def verify(self, row: Row, answer: str) -> bool:
        """Return whether an answer is the right one; space around it does not count."""
        return answer.strip() == str(row["completion"]).strip()


@dataclass(frozen=True, slots=True)
class Sums(_Exact):
    """``12+34=`` → ``46``. The difficulty is the greatest number of digits of an operand: 2 gives 10,000 problems.

    ``34+12=`` is another problem than ``12+34=`` and may be in another split.
    """

    name: str = "sums"
    hardest: int = 9

    def size(self, difficulty: int) -> int:
        """Return how many pairs of operands there are."""
        return 10 ** (2 * difficulty)  # type: ignore[no-any-return]

    def row(self, number: int, difficulty: int) -> Row:
        """Return one sum."""
        a, b = divmod(number, 10**difficulty)
        return {"prompt": f"{a}+{b}=", "completion": str(a + b)}

    def wrong_answer(self, row: Row, rng: Random) -> str:
        """Return a sum that is off by at most 10, never negative."""
        right = int(row["completion"])
        return str(rng.choice([n for n in range(max(0, right - 10), right + 11) if n != right]))


@dataclass(frozen=True, slots=True)
class Reverse(_Exact):
    """``abc>`` → ``cba``. The difficulty is the number of letters, by threes."""

    name: str = "reverse"
    hardest: int = 4

    def size(self, difficulty: int) -> int:
        """Return how many strings there are."""
        return len(_LETTERS) ** (3 * difficulty)  # type: ignore[no-any-return]

    def row(self, number: int, difficulty: int) -> Row:
        """Return one string to reverse."""
        text = _digits(number, _LETTERS, 3 * difficulty)
        return {"prompt": f"{text}>", "completion": text[::-1]}

    def wrong_answer(self, row: Row, rng: Random) -> str:
        """Return the right string with one letter changed."""
        return _with_one_changed(str(row["completion"]), _LETTERS, rng)


@dataclass(frozen=True, slots=True)
class Sort(_Exact):
    """``3142<`` → ``1234``. The difficulty is the number of digits, by fours."""

    name: str = "sort"
    hardest: int = 4

    def size(self, difficulty: int) -> int:
        """Return how many strings of digits there are."""
        return 10 ** (4 * difficulty)  # type: ignore[no-any-return]

    def row(self, number: int, difficulty: int) -> Row:
        """Return one string of digits to sort."""
        text = _digits(number, "0123456789", 4 * difficulty)
        return {"prompt": f"{text}<", "completion": "".join(sorted(text))}

    def wrong_answer(self, row: Row, rng: Random) -> str:
        """Return the sorted string with one digit changed."""
        return _with_one_changed(str(row["completion"]), "0123456789", rng)


@dataclass(frozen=True, slots=True)
class Parity(_Exact):
    """``0110 0010?`` → ``odd``: is the number of ones even or odd? The difficulty is the number of bits, by eights."""

    name: str = "parity"
    hardest: int = 7

    def size(self, difficulty: int) -> int:
        """Return how many strings of bits there are."""
        return 2 ** (8 * difficulty)  # type: ignore[no-any-return]

    def row(self, number: int, difficulty: int) -> Row:
        """Return one string of bits, with the two labels."""
        bits = f"{number:0{8 * difficulty}b}"
        label = "odd" if bits.count("1") % 2 else "even"
        return {"prompt": f"{bits}?", "completion": label, "labels": ["even", "odd"]}

    def wrong_answer(self, row: Row, rng: Random) -> str:  # noqa: ARG002 - there is only one
        """Return the other label."""
        return "even" if row["completion"] == "odd" else "odd"


def _digits(number: int, alphabet: str, length: int) -> str:
    """Write a number in the positional system of an alphabet, filled up to ``length`` places."""
    places = []
    for _ in range(length):
        number, place = divmod(number, len(alphabet))
        places.append(alphabet[place])
    return "".join(reversed(places))


def _with_one_changed(text: str, alphabet: str, rng: Random) -> str:
    place = rng.randrange(len(text))
    other = rng.choice([letter for letter in alphabet if letter != text[place]])
    return text[:place] + other + text[place + 1 :]


TASKS: Mapping[str, Task] = {task.name: task for task in (Sums(), Reverse(), Sort(), Parity())}
"""All built-in tasks by name."""


def permuted(number: int, size: int, key: str) -> int:
    """Return the image of ``number`` under a keyed permutation of ``range(size)``, without storing it.

    A Feistel network of four rounds over the next larger square, walked until it falls into the range (Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains", section 5): O(1) memory, so that 10^18 problems can be
    permuted.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = number >> half_bits, number & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        number = (left << half_bits) | right
        if number < size:
            return number


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of one split of a task, made when they are asked for.

    The split of a problem does not depend on the seed; the seed decides the order, and, where a split has more
    problems than are used, which of them.

    Attributes:
        task: the family of problems.
        difficulty: how hard they are.
        split: ``train``, ``validation`` or ``test``.
        seed: of the order.
        first: where the split begins among the permuted problems.
        available: how many problems the split has.
        used: how many of them are rows.
        pairs: rows also have ``rejected``, a wrong answer, and call the right one ``chosen``.
    """

    task: Task
    difficulty: int
    split: str
    seed: int
    first: int
    available: int
    used: int
    pairs: bool = False

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.used

    def __iter__(self) -> Iterator[Row]:
        """Make the rows one after the other."""
        return (self[index] for index in range(self.used))

    def __getitem__(self, index: int) -> Row:
        """Return one row.

        Raises:
            IndexError: the index is out of range (negative ones are).
        """
        if not 0 <= index < self.used:
            raise IndexError(f"row {index} of task {self.task.name!r} ({self.split}), which has {self.used} rows")
        place = self.first + permuted(index, self.available, f"order/{self.seed}/{self.split}")
        number = permuted(place, self.task.size(self.difficulty), f"split/{self.task.name}/{self.difficulty}")
        row = self.task.row(number, self.difficulty)
        if not self.pairs:
            return row
        wrong = self.task.wrong_answer(row, Random(f"{self.seed}/{number}"))
        return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong}


def open_task(
    name: str, *, split: str = "train", seed: int = 0, limit: int = 0, options: Mapping[str, str] | None = None
) -> TaskRows:
    """Open one split of a built-in task.

    Validation and test have a twentieth of all problems each, at most 500; training has the rest, of which 9,000 are
    used unless ``limit`` asks for more.

    Args:
        name: one of ``TASKS``.
        split: ``train``, ``validation`` or ``test``.
        seed: of the order; it never moves a problem from one split to another.
        limit: at most this many rows; 0 for the default.
        options: ``difficulty``, 1 or more, default 2; ``rows``: ``answers`` (the default) or ``pairs``, which have a
            right answer ``chosen`` and a wrong one ``rejected``.

    Raises:
        DatasetNotFound: no such task or no such split.
        ConfigError: an unknown option, or a difficulty out of range.
        EmptyDataset: the task has too few problems for this split.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"tasks: {', '.join(TASKS)}"
        raise DatasetNotFound(f"there is no built-in task {name!r}", hint=hint)
    task = TASKS[name]
    difficulty = _difficulty(task, options or {})
    size = task.size(difficulty)
    held = min(_HELD_OUT, size // 20)
    places = {"test": (0, held), "validation": (held, held), "train": (2 * held, size - 2 * held)}
    if split not in places:
        raise DatasetNotFound(f"task {name!r} has no split {split!r}", hint=f"its splits: {', '.join(places)}")
    first, available = places[split]
    if not available:
        raise EmptyDataset(f"task {name!r} has no problem for the split {split!r} at difficulty {difficulty}")
    used = min(available, limit or _TRAIN)
    return TaskRows(task, difficulty, split, seed, first, available, used, _pairs(task, options or {}))


def _pairs(task: Task, options: Mapping[str, str]) -> bool:
    kind = options.get("rows", "answers")
    if kind not in ("answers", "pairs"):
        raise ConfigError(f"task {task.name!r}: rows={kind!r} is neither answers nor pairs")
    return kind == "pairs"


def _difficulty(task: Task, options: Mapping[str, str]) -> int:
    unknown = sorted(set(options) - {"difficulty", "rows"})
    if unknown:
        raise ConfigError(f"task {task.name!r} has no option {unknown[0]!r}", hint="its options: difficulty, rows")
    text = str(options.get("difficulty", "2"))
    if not text.isdecimal() or not 1 <= int(text) <= task.hardest:
        raise ConfigError(f"task {task.name!r}: difficulty={text!r} is not a number from 1 to {task.hardest}")
    return int(text)
