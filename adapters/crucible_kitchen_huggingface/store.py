"""The dataset store over the package ``datasets``: hub ids, saved datasets, directories of data files.

It imports that package when the first dataset is opened. Read next: ``crucible_kitchen.splits``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crucible_kitchen.errors import (
    BackendError,
    DataError,
    DatasetNotFound,
    EmptyDataset,
    MissingExtra,
    TransientBackendError,
)
from crucible_kitchen.ports import DatasetSpec
from crucible_kitchen.splits import IndexedDataset, check_options, pick_split
from crucible_kitchen.types import JsonObject, Row
from crucible_kitchen.workers import run_sync

__all__ = ["HuggingFaceDatasetStore"]


class HuggingFaceDatasetStore:
    """Opens a hub id (``owner/name``), a directory written by ``save_to_disk``, or a directory of data files.

    Rows stay in memory-mapped Arrow files. A dataset with one split is cut by ``holdout`` and ``seed``. Options of a
    spec: ``config`` (which of the dataset's configurations) and ``revision``. Access to private datasets is what the
    environment gives (``HF_TOKEN`` or a login), and so is ``HF_HUB_OFFLINE=1``, which never asks the network. No code
    of a dataset is ever run. A download cannot be interrupted: cancelling waits for its end.

    Args:
        cache_dir: where downloads are kept; unset: where ``datasets`` keeps them.
    """

    def __init__(self, *, cache_dir: str | None = None) -> None:
        self._cache_dir = cache_dir

    @property
    def synthetic(self) -> bool:
        """Never."""
        return False

    async def load(self, spec: DatasetSpec) -> IndexedDataset:
        """Open a dataset; the first time this downloads it.

        Raises:
            DatasetNotFound: no such dataset, configuration or split, or it is not in the cache and the network may
                not be asked.
            EmptyDataset: it has no rows.
            ConfigError: an unknown option.
            MissingExtra: the package ``datasets`` is not installed.
            TransientBackendError: the hub cannot be reached.
        """
        return await run_sync(self._load, spec)

    def _load(self, spec: DatasetSpec) -> IndexedDataset:
        options = check_options(spec, ("config", "revision"))
        library = _library()
        with _translated(spec.name, offline=library.config.HF_HUB_OFFLINE):
            splits = self._open(library, spec.name, options)
        own, indices = pick_split(spec, {str(name): len(split) for name, split in splits.items()})
        return IndexedDataset(spec.name, spec.split, _Reader(splits[own]).read, indices)

    def _open(self, library: Any, name: str, options: Mapping[str, str]) -> Mapping[str, Any]:
        path = Path(name).expanduser()
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            try:
                found = library.load_from_disk(str(path))
            except IndexError as error:  # what the library makes of a saved split without rows
                raise EmptyDataset(f"dataset {name!r} has a split without rows", hint="save it without it") from error
        else:
            source = str(path) if path.is_dir() else name
            found = library.load_dataset(
                source,
                options.get("config"),
                revision=options.get("revision"),
                cache_dir=self._cache_dir,
            )
        return found if isinstance(found, Mapping) else {"train": found}

    def public_options(self) -> JsonObject:
        """Return no options: where the cache is is the machine's business."""
        return {}

    async def aclose(self) -> None:
        """Nothing is held between calls."""


class _Reader:
    """Rows by number of one split; a call takes them from Arrow in one go."""

    def __init__(self, split: Any) -> None:
        self._split = split

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Return rows in the order asked for."""
        if not indices:
            return []
        columns: Mapping[str, list[Any]] = self._split[list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _library() -> Any:
    """Import the package; its progress bars are off, because the run's own display has the terminal."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data") from error
    datasets.disable_progress_bars()
    return datasets


@contextmanager
def _translated(name: str, *, offline: bool) -> Iterator[None]:
    """Turn the errors of ``datasets`` and of the hub into ours, once."""
    import datasets.exceptions
    import huggingface_hub.errors

    absent = (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DataFilesNotFoundError,
        datasets.exceptions.DefunctDatasetError,
        huggingface_hub.errors.RepositoryNotFoundError,
        huggingface_hub.errors.RevisionNotFoundError,
        huggingface_hub.errors.HFValidationError,
        FileNotFoundError,
    )
    try:
        yield
    except EmptyDataset:
        raise
    except absent as error:
        raise DatasetNotFound(f"there is no dataset {name!r} on the hub or the disk", hint=_hint(offline)) from error
    except ConnectionError as error:  # OfflineModeIsEnabled is one
        if offline:
            raise DatasetNotFound(f"dataset {name!r} is not in the local cache", hint=_hint(offline)) from error
        raise TransientBackendError(f"the hub cannot be reached for dataset {name!r}", hint="try again") from error
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise BackendError(f"the hub refused dataset {name!r} ({type(error).__name__})") from error
    except datasets.exceptions.DatasetsError as error:
        # What the library says may show a row: its text goes no further.
        hint = "its files differ in their fields, or are not what their names say"
        raise DataError(f"dataset {name!r} cannot be read ({type(error).__name__})", hint=hint) from None
    except ValueError as error:  # a configuration that is unknown, or that has to be chosen
        hint = f"{str(error).splitlines()[0][:300]} (dataset_options={{'config': ...}})"
        raise DatasetNotFound(f"dataset {name!r} cannot be opened as asked", hint=hint) from None


def _hint(offline: bool) -> str:
    if offline:
        return "the network is off (HF_HUB_OFFLINE): download it once with the network on, or give a path"
    return "check the spelling; a private dataset needs HF_TOKEN; for a file use --adapter dataset_store=files"
