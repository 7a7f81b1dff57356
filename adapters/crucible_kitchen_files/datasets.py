"""The dataset store of the local disk: built-in tasks, files, directories of files.

It knows no network and no optional package until a name asks for one. Read next: ``crucible_kitchen_files.sources``.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

from crucible_kitchen.errors import DataError, DatasetNotFound
from crucible_kitchen.ports import DatasetSpec
from crucible_kitchen.splits import IndexedDataset, canonical_split, check_options, pick_split
from crucible_kitchen.tasks import TASKS, open_task
from crucible_kitchen.types import JsonObject
from crucible_kitchen.workers import run_sync
from crucible_kitchen_files.gym import PREFIX, gym_rows
from crucible_kitchen_files.sources import SUFFIXES, ConcatSource, ListSource, Source, open_source

__all__ = ["FilesDatasetStore"]

_DESCRIPTIONS = ("dataset_info", "dataset_infos", "dataset_dict", "state")  # JSON that speaks about the data


class FilesDatasetStore:
    """Opens ``sums`` and its like, ``reasoning_gym:<name>``, a file, or a directory with a file per split.

    A name is taken for a built-in task first; write ``./sums`` for a file of that name. In a directory, ``train.jsonl``
    and ``train-00000-of-00002.parquet`` belong to the split ``train``; a directory with one data file of any name is
    that file. A single file is cut into splits by ``holdout`` and ``seed``.

    Args:
        data_root: if given, files must lie below this directory once links are resolved, and relative names are
            relative to it.
    """

    def __init__(self, *, data_root: str | None = None) -> None:
        self._data_root = data_root

    @property
    def synthetic(self) -> bool:
        """Never: the rows are real, built-in tasks included."""
        return False

    async def load(self, spec: DatasetSpec) -> IndexedDataset:
        """Open a dataset.

        Raises:
            DatasetNotFound: no such task, file or split; the hint names what is near.
            EmptyDataset: it has no rows.
            ConfigError: an option that the source does not know.
            DataError: the file is not what its name says.
        """
        return await run_sync(self._load, spec)

    def _load(self, spec: DatasetSpec) -> IndexedDataset:
        split = canonical_split(spec.split)
        if spec.name in TASKS:
            task = open_task(spec.name, split=split, seed=spec.seed, limit=spec.limit, options=dict(spec.options))
            return IndexedDataset(spec.name, spec.split, lambda indices: [task[i] for i in indices], range(len(task)))
        if spec.name.startswith(PREFIX):
            name = spec.name.removeprefix(PREFIX)
            rows = gym_rows(name, split, limit=spec.limit, seed=spec.seed, options=dict(spec.options))
            return IndexedDataset(spec.name, spec.split, ListSource(rows).read, range(len(rows)))
        check_options(spec, ())
        sources = _open_all(self._path(spec.name))
        own, indices = pick_split(spec, {name: len(source) for name, source in sources.items()})
        return IndexedDataset(spec.name, spec.split, sources[own].read, indices)

    def _path(self, name: str) -> Path:
        path = Path(name).expanduser()
        if self._data_root is not None:
            root = Path(self._data_root).resolve()
            path = (root / path).resolve()
            if not path.is_relative_to(root):
                raise DatasetNotFound(f"dataset {name!r} is not below the data root")
        if not path.exists():
            raise DatasetNotFound(
                f"there is no dataset {name!r}: it is neither a built-in task nor a file or directory",
                hint=_hint(name, path),
            )
        return path

    def public_options(self) -> JsonObject:
        """Return all options; none is secret."""
        return {"data_root": self._data_root}

    async def aclose(self) -> None:
        """Nothing is held between calls."""


def _hint(name: str, path: Path) -> str:
    """Name what is near: a task, or a file beside the missing one; a hub id needs another adapter."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, TASKS, n=1)
    near += [str(Path(name).with_name(found)) for found in difflib.get_close_matches(path.name, beside, n=1)]
    parts = [f"did you mean {' or '.join(repr(n) for n in near)}?"] if near else []
    if name.count("/") == 1 and not path.suffix:
        parts.append("for a hub id use --adapter dataset_store=huggingface")
    return "; ".join([*parts, f"built-in tasks: {', '.join(TASKS)}, {PREFIX}<name>"])


def _open_all(path: Path) -> Mapping[str, Source]:
    """Open every split below a path, by the name its files give it; a single file is ``train``."""
    if path.is_file():
        return {"train": open_source(path)}
    files = sorted(file for file in path.iterdir() if _is_data(file))
    if not files:
        raise DatasetNotFound(
            f"the directory {path.name} holds no data file",
            hint=f"a file per split: train.jsonl; {', '.join(SUFFIXES)}",
        )
    if len(files) == 1:
        own = _split_of(files[0])
        return {own if own in ("validation", "test") else "train": open_source(files[0])}
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    for split, parts in by_split.items():
        if len({part.suffix.lower() for part in parts}) > 1:
            names = ", ".join(part.name for part in parts)
            raise DataError(f"the split {split!r} is there in several formats: {names}", hint="keep one of them")
    return {split: _joined(parts) for split, parts in by_split.items()}


def _is_data(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.stem not in _DESCRIPTIONS and file.is_file()


def _split_of(file: Path) -> str:
    """Return the split that a file's name says: ``train-00000-of-00002.parquet`` and ``train_1.jsonl`` are train."""
    stem = file.stem
    for separator in ("-", "_"):
        head, found, tail = stem.partition(separator)
        if found and tail[:1].isdigit():
            stem = head
    return canonical_split(stem)


def _joined(files: list[Path]) -> Source:
    sources = [open_source(file) for file in files]
    return sources[0] if len(sources) == 1 else ConcatSource(sources)
