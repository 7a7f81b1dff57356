"""Which process owns an attempt, and whether it still lives, as far as that can be known from here.

It knows processes and no store. Read next: ``crucible_kitchen.store.records``.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["Owner"]

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told from every other one that had or will have its number.

    Where ``/proc`` does not say (outside Linux), ``boot`` and ``namespace`` are empty and ``born`` is 0.

    Attributes:
        host: the machine's name.
        boot: id of the machine's start.
        namespace: the pid namespace, as a container has one of its own.
        pid: the process's number.
        born: when it started, in clock ticks since the machine did: a number used again has another.
    """

    host: str = ""
    boot: str = ""
    namespace: str = ""
    pid: int = 0
    born: int = 0

    @classmethod
    def here(cls) -> Self:
        """Return this process."""
        pid = os.getpid()
        return cls(platform.node(), _boot(), _namespace(), pid, _born(pid) or 0)

    def alive(self) -> bool | None:
        """Return whether it runs (a stopped one does), or None where that cannot be known from here."""
        if os.name != "posix" or not self.pid:
            return None
        if (self.host, self.boot, self.namespace) != (platform.node(), _boot(), _namespace()):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's process: it is there
        born = _born(self.pid)
        if born is None or not self.born:
            return None  # a process of this number is there, perhaps another one
        return born == self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "a process that is not known"


def _boot() -> str:
    return _text(_PROC / "sys/kernel/random/boot_id")


def _namespace() -> str:
    try:
        return str((_PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def _born(pid: int) -> int | None:
    """Return when a process started: 0 if it has ended and only waits to be collected, None if it cannot be known."""
    # The name, in brackets, may hold anything; after it come the state and, 19 fields later, the start time.
    fields = _text(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
