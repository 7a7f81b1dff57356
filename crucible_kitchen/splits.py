"""What every dataset store shares: names and cuts of splits, a dataset by index, the hash of its content.

It knows no file and no hub: a source is any function that returns rows by index.
Read next: ``crucible_kitchen.ports.dataset_store``, then ``crucible_kitchen.rendering``.
"""

import datetime
import decimal
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from crucible_kitchen.errors import ConfigError, DatasetNotFound, EmptyDataset, RowError
from crucible_kitchen.ports.dataset_store import DatasetSpec
from crucible_kitchen.types import IntArray, Row
from crucible_kitchen.workers import run_sync

__all__ = [
    "SPLITS",
    "IndexedDataset",
    "canonical_row",
    "canonical_split",
    "check_options",
    "cut_split",
    "pick_split",
]

SPLITS = ("train", "validation", "test")
"""The splits that a source with only one is cut into."""

_ALIASES = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
_CHUNK = 512


def canonical_split(name: str) -> str:
    """Return the usual name of a split: ``val``, ``valid`` and ``dev`` mean ``validation``."""
    return _ALIASES.get(name.lower(), name)


def cut_split(rows: int, split: str, *, holdout: float, seed: int) -> IntArray:
    """Return which rows of a source with one split belong to ``split``.

    A permutation drawn from the seed decides; the held-out rows are halved between test (the larger half) and
    validation. The three are disjoint and together all rows. Training rows keep the source's order; held-out rows
    are in the order drawn, so that the first few of them are a fair sample of a file sorted by label.

    Args:
        rows: how many rows the source has.
        split: ``train``, ``validation`` or ``test``.
        holdout: share (below 1) or number (1 or more) of rows held out; 0 holds out none.
        seed: of the cut: the same seed cuts the same rows.

    Returns:
        Row numbers, int64.
    """
    held = round(rows * holdout) if holdout < 1 else int(holdout)
    if holdout > 0 and rows > 1:
        held = max(held, 1)
    held = min(held, rows)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(rows).astype(np.int64)
    test = (held + 1) // 2
    return {"test": order[:test], "validation": order[test:held], "train": np.sort(order[held:])}[split]


def pick_split(spec: DatasetSpec, sizes: Mapping[str, int]) -> tuple[str, IntArray]:
    """Decide which rows of which of the source's own splits a spec means.

    A source with one split is cut by :func:`cut_split`; one with several is taken as it is.

    Args:
        spec: what was asked for.
        sizes: number of rows by the source's own split names.

    Returns:
        The source's own split, and row numbers within it: at most ``spec.limit``, the first ones.

    Raises:
        DatasetNotFound: the source has no such split and none can be cut.
        EmptyDataset: the split has no rows.
    """
    wanted = canonical_split(spec.split)
    by_name = {canonical_split(name): name for name in sizes} | {name: name for name in sizes}
    only = next(iter(sizes)) if len(sizes) == 1 else ""
    if only and canonical_split(only) == "train" and wanted in SPLITS:
        source = only
        if wanted != "train" and not spec.holdout:
            raise DatasetNotFound(
                f"dataset {spec.name!r} has the split {only!r} only", hint="set holdout above 0 to hold rows out of it"
            )
        indices = cut_split(sizes[only], wanted, holdout=spec.holdout, seed=spec.seed)
    elif spec.split in by_name or wanted in by_name:
        source = by_name.get(spec.split) or by_name[wanted]
        indices = np.arange(sizes[source], dtype=np.int64)
    else:
        known = ", ".join(sizes) + (" (and what is held out of it: validation, test)" if only == "train" else "")
        raise DatasetNotFound(f"dataset {spec.name!r} has no split {spec.split!r}", hint=f"its splits: {known}")
    if not len(indices):
        raise _empty(spec, sizes[source])
    return source, indices[: spec.limit] if spec.limit else indices


def _empty(spec: DatasetSpec, rows: int) -> EmptyDataset:
    hint = f"the source has {rows} rows, of which holdout={spec.holdout:g} is held out" if rows else None
    return EmptyDataset(f"dataset {spec.name!r}, split {spec.split!r}, has no rows", hint=hint)


def check_options(spec: DatasetSpec, known: Sequence[str]) -> dict[str, str]:
    """Return a spec's options as a dict.

    Raises:
        ConfigError: one of them is not known to the source.
    """
    options = dict(spec.options)
    for key in options:
        if key not in known:
            hint = f"its options: {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"dataset {spec.name!r} has no option {key!r} (dataset_options)", hint=hint)
    return options


def canonical_row(row: Row, index: int = 0) -> bytes:
    """Return a row as canonical JSON: the same content gives the same bytes, whatever file it came from.

    Raises:
        RowError: a value has no canonical form (``index`` names the row).
    """
    try:
        return json.dumps(row, sort_keys=True, separators=(",", ":"), default=_plain).encode()
    except TypeError as error:
        raise RowError(index, str(error).partition(":")[0], "is of a kind that cannot be hashed") from None


def _plain(value: Any) -> Any:
    """Return a value that columnar formats have and JSON has not, as JSON; the kind is part of it."""
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return {"seconds": value.total_seconds()}
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(type(value).__name__)


class IndexedDataset:
    """A ``Dataset`` over a source that returns rows by number; reading runs in worker threads.

    Args:
        name: what it was opened as.
        split: which split it is.
        read: returns the source's rows of these numbers, in this order; may block; called from any thread.
        indices: the source's row number of each row.
    """

    def __init__(
        self, name: str, split: str, read: Callable[[Sequence[int]], list[Row]], indices: Iterable[int] | IntArray
    ) -> None:
        self._name = name
        self._split = split
        self._read = read
        self._indices: IntArray = np.asarray(indices, dtype=np.int64)
        self._fingerprint = ""

    @property
    def name(self) -> str:
        """What it was opened as."""
        return self._name

    @property
    def split(self) -> str:
        """Which split it is."""
        return self._split

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._indices)

    async def fingerprint(self) -> str:
        """Return the sha256 (hex) of the rows' canonical JSON, each followed by a newline, in order.

        Reads a few hundred rows at a time, so that memory is bounded and a cancellation is heard.
        """
        if not self._fingerprint:
            digest = hashlib.sha256()
            for start in range(0, len(self), _CHUNK):
                await run_sync(self._hash, digest, start)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _hash(self, digest: Any, start: int) -> None:
        chunk = [int(i) for i in self._indices[start : start + _CHUNK]]
        for offset, row in enumerate(self._read(chunk)):
            digest.update(canonical_row(row, start + offset) + b"\n")

    async def rows(self, indices: Sequence[int]) -> list[Row]:
        """Return rows by index, in the order asked for.

        Raises:
            IndexError: an index is out of range.
            RowError: a row cannot be read.
        """
        numbers = self._numbers(indices)
        return await run_sync(self._read, [int(i) for i in numbers])

    def select(self, indices: Sequence[int]) -> "IndexedDataset":
        """Return the dataset of these rows, in this order.

        Raises:
            IndexError: an index is out of range.
        """
        return IndexedDataset(self._name, self._split, self._read, self._numbers(indices))

    def _numbers(self, indices: Sequence[int]) -> IntArray:
        """Return the source's row numbers of these rows; negative indices are out of range like too large ones."""
        wanted = np.asarray(indices, dtype=np.int64)
        wrong = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(wrong):
            raise IndexError(f"row {wrong[0]} of dataset {self._name!r} ({self._split}), which has {len(self)} rows")
        return self._indices[wanted]
