"""Models written for use elsewhere, as archives that wait to be fetched: one for each model, until it is closed.

Knows files, not training. Read next: ``crucible_kitchen.service.operations``.
"""

import hashlib
import secrets
import shutil
import tarfile
from pathlib import Path

from crucible_kitchen.errors import SessionLost
from crucible_kitchen.service.weights import storage_errors
from crucible_kitchen.types import ExportedModel, JsonObject

__all__ = ["Exports"]


class Exports:
    """Archives below a directory, which is emptied when the server starts. Its methods block.

    Args:
        directory: of the archives.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._archives: dict[str, str] = {}

    def begin(self, model: str) -> Path:
        """Return a new empty directory for a model's export; the model's last archive goes."""
        self.forget(model)
        with storage_errors():
            directory = self._directory / secrets.token_hex(8)
            directory.mkdir(parents=True)
        self._archives[model] = directory.name
        return directory

    def pack(self, exported: ExportedModel) -> JsonObject:
        """Put what was exported into one archive and return what its client needs to know.

        Raises:
            StorageFull: the disk is full.
        """
        directory = Path(exported.directory)
        path = directory.with_suffix(".tar")
        with storage_errors():
            with tarfile.open(path, "w") as archive:
                for name in sorted(exported.files):
                    archive.add(directory / name, name, recursive=False)
            shutil.rmtree(directory)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "type": "export_model",
            "archive": directory.name,
            "format": exported.format,
            "files": list(exported.files),
            "base_model": exported.base_model,
            "sha256": digest,
        }

    def find(self, archive: str) -> Path:
        """Return the file of an archive.

        Raises:
            SessionLost: it is gone, with its model or with an earlier life of the server.
        """
        path = self._directory / f"{archive}.tar"
        if archive not in self._archives.values() or not path.exists():
            raise SessionLost("the archive is gone", hint="export the model again")
        return path

    def forget(self, model: str) -> None:
        """Remove a model's archive."""
        name = self._archives.pop(model, None)
        if name is not None:
            shutil.rmtree(self._directory / name, ignore_errors=True)
            (self._directory / f"{name}.tar").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what an earlier life of the server left."""
        shutil.rmtree(self._directory, ignore_errors=True)
