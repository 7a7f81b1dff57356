"""A trained model, fetched from the server that wrote it: one archive, checked before it is unpacked.

Knows files and the wire. Read next: ``crucible_kitchen_http.endpoint``.
"""

import hashlib
import io
import tarfile
from pathlib import Path

from crucible_kitchen.errors import BackendError, BackendUserError, IntegrityError, StorageFull
from crucible_kitchen.types import ExportedModel, JsonObject
from crucible_kitchen.workers import run_sync
from crucible_kitchen_http.endpoint import Endpoint

__all__ = ["check_directory", "fetch"]


def check_directory(directory: Path) -> None:
    """Check that a directory can take an export.

    Raises:
        BackendUserError: it does not exist or is not empty.
    """
    if not directory.is_dir() or any(directory.iterdir()):
        raise BackendUserError("export needs a directory that exists and is empty", hint="make a new directory")


async def fetch(endpoint: Endpoint, answer: JsonObject, directory: Path) -> ExportedModel:
    """Fetch the archive that an answer speaks of and unpack it.

    Raises:
        IntegrityError: what came is not what the server wrote.
    """
    try:
        archive = str(answer["archive"])
        files = tuple(str(name) for name in answer["files"])
        told = ExportedModel(str(directory), str(answer["format"]), files, str(answer["base_model"]))
        digest = str(answer["sha256"])
    except (KeyError, TypeError) as error:
        raise BackendError("the server's answer tells of no archive") from error
    data = await endpoint.download(f"exports/{archive}")
    await run_sync(_unpack, data, digest, directory, files)
    return told


def _unpack(data: bytes, digest: str, directory: Path, files: tuple[str, ...]) -> None:
    if hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError("the archive of the model does not hold the bytes that the server wrote")
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(directory, filter="data")
    except (tarfile.TarError, ValueError) as error:
        raise IntegrityError("the archive of the model cannot be read") from error
    except OSError as error:
        raise StorageFull("the model could not be written", hint="free some space") from error
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise IntegrityError(f"the archive of the model lacks {missing[0]!r}")
