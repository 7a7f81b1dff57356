"""What little the toy adapters write: whole files or none, with the machine's errors translated once.

Knows no model. Read next: ``crucible_kitchen_noop.state``.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crucible_kitchen.errors import StorageFull, StoreError

__all__ = ["storing", "write_whole"]


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Turn the machine's errors into this project's: a full disk, or any other failure to write."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"no space left to write {what}", hint="free space, or choose another home") from error
        raise StoreError(f"cannot write {what}: {error.strerror}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old bytes or the new ones, never a part."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
