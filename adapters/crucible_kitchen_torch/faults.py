"""Foreign exceptions become errors of our tree here, once, at the executor's edge.

Knows exceptions only by class and by torch's own wording. Read next: ``trainer.py``.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crucible_kitchen.errors import BackendError, OutOfMemory, StorageFull, StoreError

__all__ = ["is_out_of_memory", "storage_errors", "torch_errors"]

_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # EFBIG: the file system or a limit allows no larger file


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception, ours or torch's, says that memory did not suffice."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error)))


@contextmanager
def torch_errors() -> Iterator[None]:
    """Translate what torch raises while it computes.

    Raises:
        OutOfMemory: the device or the machine has too little memory.
        BackendError: torch refused for another reason.
    """
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        if isinstance(error, OutOfMemory):
            raise
        raise _out_of_memory() from error
    except RuntimeError as error:
        if _MEMORY.search(str(error)):
            raise _out_of_memory() from error
        first = str(error).partition("\n")[0]
        raise BackendError(f"torch failed: {first}") from error


def _out_of_memory() -> OutOfMemory:
    return OutOfMemory(
        "there is not enough memory for this computation",
        hint="lower the adapter option tokens_per_microbatch, max_length or batch_size, or train with lora_rank",
    )


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Translate what writing files raises, safetensors' own error included.

    Raises:
        StorageFull: there is no room for the file.
        StoreError: it could not be written for another reason.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _storage_error(what, error.errno or 0, error.strerror or "") from error
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise _storage_error(what, int(found.group(1)) if found else 0, str(error)) from error


def _storage_error(what: str, number: int, text: str) -> StoreError:
    if number in _FULL:
        return StorageFull(f"{what} does not fit on the disk", hint="free some space; what was saved before is kept")
    return StoreError(f"{what} could not be written: {text}")
