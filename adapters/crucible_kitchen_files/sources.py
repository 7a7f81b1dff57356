"""Rows by number from files: JSONL by line offsets, Parquet by row groups, JSON and CSV in memory.

Everything here blocks and is called in worker threads; it knows no split.
Read next: ``crucible_kitchen_files.datasets``.
"""

import copy
import csv
import json
import threading
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from crucible_kitchen.errors import DataError, DatasetNotFound, MissingExtra, RowError
from crucible_kitchen.types import Row

__all__ = ["SUFFIXES", "ConcatSource", "JsonlSource", "ListSource", "ParquetSource", "Source", "open_source"]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Source(Protocol):
    """Rows by number, from 0; safe in any thread."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Return rows in the order asked for; the numbers are in range."""
        ...


class ListSource:
    """Rows that are in memory already; copies are handed out."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Return rows in the order asked for."""
        return [copy.deepcopy(self._rows[i]) for i in indices]


class JsonlSource:
    """A file with one JSON object a line, indexed by the lines' offsets: 16 bytes of memory a row.

    Blank lines are skipped. A file that changes after it was opened is refused, not misread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")
        self._lines = array("q")
        self._state = _state(path)
        place = 0
        with path.open("rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    self._offsets.append(place)
                    self._lines.append(line)
                place += len(text)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._offsets)

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Return rows in the order asked for.

        Raises:
            RowError: a line is not a JSON object.
            DataError: the file changed.
        """
        if _state(self._path) != self._state:
            raise DataError(f"the file {self._path.name} changed while it was in use", hint="start the run again")
        with self._path.open("rb") as file:
            return [self._row(file, i) for i in indices]

    def _row(self, file: Any, i: int) -> Row:
        file.seek(self._offsets[i])
        line = self._lines[i]
        try:
            row = json.loads(file.readline().decode("utf-8-sig" if i == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise RowError(i, self._path.name, f"line {line} is not JSON ({problem})") from None
        if not isinstance(row, dict):
            raise RowError(i, self._path.name, f"line {line} is not a JSON object")
        return row


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class ParquetSource:
    """A Parquet file read by row groups; the group used last stays in memory."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingExtra("pyarrow", "data") from error
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path.name} is not a Parquet file that can be read") from error
        groups = self._file.metadata.num_row_groups
        sizes: list[int] = [self._file.metadata.row_group(g).num_rows for g in range(groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._lock = threading.Lock()  # a reader's state is not safe in several threads
        self._group = -1
        self._table: Any = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._starts[-1]

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Return rows in the order asked for; each row group is read once a call."""
        places: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            places.setdefault(bisect_right(self._starts, i) - 1, []).append(place)
        rows: list[Row] = [{}] * len(indices)
        with self._lock:
            for group, members in places.items():
                if group != self._group:
                    self._table, self._group = self._file.read_row_group(group), group
                taken = self._table.take([indices[place] - self._starts[group] for place in members])
                for place, row in zip(members, taken.to_pylist(), strict=True):
                    rows[place] = row
        return rows


class ConcatSource:
    """Several sources one after the other, as a dataset in shards is."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._starts = list(accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._starts[-1]

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Return rows in the order asked for; each part is read once a call. An error names the row of the whole."""
        places: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            places.setdefault(bisect_right(self._starts, i) - 1, []).append(place)
        rows: list[Row] = [{}] * len(indices)
        for part, members in places.items():
            start = self._starts[part]
            try:
                found = self._parts[part].read([indices[place] - start for place in members])
            except RowError as error:
                problem = str(error).partition(": ")[2]
                raise RowError(error.row + start, error.field, problem, hint=error.hint) from None
            for place, row in zip(members, found, strict=True):
                rows[place] = row
        return rows


def open_source(path: Path) -> Source:
    """Open a file by its suffix.

    Raises:
        DatasetNotFound: the suffix is none of ``SUFFIXES``, or the file cannot be opened.
        DataError: the file is not what its suffix says.
        MissingExtra: Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return ParquetSource(path)
        if suffix in (".csv", ".tsv"):
            return ListSource(_csv_rows(path, "\t" if suffix == ".tsv" else ","))
        if suffix == ".jsonl" or (suffix == ".json" and not _is_json_list(path)):
            return JsonlSource(path)
        if suffix == ".json":
            return ListSource(_json_rows(path))
    except OSError as error:
        raise DatasetNotFound(f"the file {path.name} cannot be read: {error.strerror}") from error
    raise DatasetNotFound(
        f"the file {path.name} is of no known kind of dataset", hint=f"the kinds: {', '.join(SUFFIXES)}"
    )


def _is_json_list(path: Path) -> bool:
    """Return whether a ``.json`` file is one list; many of them are JSONL."""
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(4096), b""):
            start = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
            if start:
                return start.startswith(b"[")
    return False


def _json_rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path.name} is not JSON{place}") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise RowError(i, path.name, f"should be an object, is {type(row).__name__}")
    return list(rows)


def _csv_rows(path: Path, delimiter: str) -> list[Row]:
    """Return the rows of a CSV file with a header; values are text. A row with too few or too many is refused."""
    csv.field_size_limit(1 << 30)  # the default refuses documents of 128 KiB; the setting is the process's
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        rows: list[Row] = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise RowError(len(rows), path.name, f"line {reader.line_num} has not {columns} values")
                rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise RowError(len(rows), path.name, f"line {reader.line_num} is not CSV ({error})") from None
    return rows
