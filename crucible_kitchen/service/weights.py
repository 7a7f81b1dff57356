"""What was saved, found again by path after a restart: one small JSON file beside each saved state.

The state itself is written by the executor, under a name that is used once, so that a name given again points to the
old state until the new one is whole. Knows files, not training. Read next: ``crucible_kitchen.service.models``.
"""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlparse

from crucible_kitchen.errors import BackendUserError, Conflict, IntegrityError, NotFoundError, StorageFull, StoreError
from crucible_kitchen.types import LoraSpec, SessionSpec, StateRef

__all__ = ["Kind", "SavedWeights", "WeightsIndex", "storage_errors"]

Kind = Literal["weights", "sampler_weights"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PATH = re.compile(r"tinker://([A-Za-z0-9][A-Za-z0-9._:-]{0,127})/(weights|sampler_weights)/([^/]{1,128})")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class SavedWeights:
    """A saved state and the session it was saved from."""

    path: str
    state: StateRef
    spec: SessionSpec


class WeightsIndex:
    """The saved weights below a directory. Its methods block.

    Args:
        home: the server's state directory.
    """

    def __init__(self, home: Path) -> None:
        self._home = home

    def states(self, run: str) -> Path:
        """Return the directory that the executor keeps a run's states in."""
        return self._home / "states" / _directory(run)

    @staticmethod
    def check_name(name: str) -> None:
        """Check the name of weights before anything is written.

        Raises:
            BackendUserError: it is not a plain name.
        """
        if not _NAME.fullmatch(name):
            raise BackendUserError(
                f"{name[:64]!r} cannot name weights", hint="use letters, digits, dots, dashes and underscores"
            )

    def check_free(self, run: str, kind: Kind, name: str) -> None:
        """Check that a name is free.

        Raises:
            Conflict: it is taken.
        """
        if self._file(run, kind, name).exists():
            raise Conflict(f"weights {name!r} exist", hint="save with overwrite=true or under another name")

    def put(self, run: str, kind: Kind, name: str, state: StateRef, spec: SessionSpec) -> SavedWeights:
        """Point a name to a state and remove the one it pointed to.

        Raises:
            StorageFull: the disk is full; the name points where it did.
        """
        file = self._file(run, kind, name)
        before = self._read(file) if file.exists() else None
        saved = SavedWeights(f"tinker://{run}/{kind}/{name}", state, spec)
        with storage_errors():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(".new")
            with aside.open("w", encoding="utf-8") as out:
                json.dump(asdict(saved), out)
                out.flush()
                os.fsync(out.fileno())
            aside.replace(file)
        if before is not None and before.state.uri != state.uri:
            self._remove(before.state)
        return saved

    def get(self, path: str) -> SavedWeights:
        """Return saved weights by the path they were saved under.

        Raises:
            BackendUserError: it is not such a path.
            NotFoundError: there are none.
            IntegrityError: what is stored about them cannot be read.
        """
        match = _PATH.fullmatch(path)
        if match is None or not _NAME.fullmatch(match[3]):
            raise BackendUserError("this is not a path of saved weights", hint="use the path that saving returned")
        run, kind, name = match.groups()
        file = self._file(run, "weights" if kind == "weights" else "sampler_weights", name)
        if not file.exists():
            raise NotFoundError(f"there are no weights {path!r}")
        return self._read(file)

    def delete(self, path: str) -> None:
        """Remove saved weights and their state.

        Raises:
            NotFoundError: there are none.
        """
        saved = self.get(path)
        run, kind, name = saved.path.removeprefix("tinker://").split("/")
        with storage_errors():
            self._file(run, "weights" if kind == "weights" else "sampler_weights", name).unlink(missing_ok=True)
        self._remove(saved.state)

    def _file(self, run: str, kind: Kind, name: str) -> Path:
        return self._home / "saved" / _directory(run) / kind / f"{name}.json"

    def _read(self, file: Path) -> SavedWeights:
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            spec = value["spec"]
            lora = LoraSpec(**{**spec["lora"], "targets": tuple(spec["lora"]["targets"])}) if spec["lora"] else None
            return SavedWeights(value["path"], StateRef(**value["state"]), SessionSpec(**{**spec, "lora": lora}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"the record of the weights {file.stem!r} cannot be read") from error

    def _remove(self, state: StateRef) -> None:
        """Remove a state of ours that nothing points to any more."""
        path = Path(unquote(urlparse(state.uri).path))
        if path.is_file() and path.is_relative_to(self._home):
            with suppress(OSError):
                path.unlink()


def _directory(run: str) -> str:
    return run.replace(":", "-")


@contextmanager
def storage_errors() -> Iterator[None]:
    """Translate what files raise.

    Raises:
        StorageFull: the disk is full.
        StoreError: it cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("the disk is full", hint="free some space; earlier weights are untouched") from error
        raise StoreError(f"the server's files cannot be written: {error.strerror}") from error
