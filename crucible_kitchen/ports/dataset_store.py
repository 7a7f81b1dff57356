"""Port ``dataset_store``: datasets with random access and a fingerprint of their content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from crucible_kitchen.types import JsonObject, Row

__all__ = ["Dataset", "DatasetSpec", "DatasetStore"]


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Which rows to open.

    Attributes:
        name: a built-in task (``sums``), a file, a directory or a hub id.
        split: ``train``, ``validation``, ``test`` or the source's own name.
        limit: at most this many rows, 0 for all.
        seed: of generated rows and of splits cut from one file.
        holdout: share (0 to 1) or number (> 1) of rows cut off for the other splits when the source has only one.
        options: the source's own options, for instance a task's ``difficulty``.
    """

    name: str
    split: str = "train"
    limit: int = 0
    seed: int = 0
    holdout: float = 0.1
    options: tuple[tuple[str, str], ...] = ()


class Dataset(Protocol):
    """Rows by index. Immutable: the same index gives the same row for as long as the fingerprint is the same.

    Splits of one source never share a row.
    """

    @property
    def name(self) -> str:
        """What it was opened as."""
        ...

    @property
    def split(self) -> str:
        """Which split it is."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    async def fingerprint(self) -> str:
        """Return the sha256 (hex) of the rows' content, in order."""
        ...

    async def rows(self, indices: Sequence[int]) -> list[Row]:
        """Return rows by index, in the order asked for.

        Raises:
            IndexError: an index is out of range.
            RowError: a row cannot be read (the file's line is not JSON, say).
        """
        ...

    def select(self, indices: Sequence[int]) -> "Dataset":
        """Return the dataset of these rows, in this order."""
        ...


@runtime_checkable
class DatasetStore(Protocol):
    """A place that datasets come from."""

    @property
    def synthetic(self) -> bool:
        """See ``Adapter``."""
        ...

    async def load(self, spec: DatasetSpec) -> Dataset:
        """Open a dataset.

        Raises:
            DatasetNotFound: no such name, or no such split.
            EmptyDataset: it has no rows.
        """
        ...

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        ...

    async def aclose(self) -> None:
        """See ``Adapter``."""
        ...
