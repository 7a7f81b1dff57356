"""A process and all that it started: found, counted and killed as a whole.

It imports the standard library only, because worker processes use it too. Where there is no ``/proc`` (macOS), only the
process group is known. Read next: ``processes.py``.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

__all__ = ["PR_SET_CHILD_SUBREAPER", "PR_SET_PDEATHSIG", "descendants", "end_tree", "prctl"]

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, argument: int, third: int = 0) -> None:
    """Set an attribute of this process (prctl(2)); does nothing where there is no such call.

    Raises:
        OSError: the kernel refused.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below one, parents before children.

    A process whose parent died stands below the nearest ancestor that reaps orphans (``PR_SET_CHILD_SUBREAPER``).
    """
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for child in _children(waiting.pop()):
            found.append(child)
            waiting.append(child)
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # a thread that has just ended hides none of the others' children
                children.extend(int(word) for word in (thread / "children").read_text().split())
    return children


def end_tree(pid: int, *, within_s: float = 5.0) -> bool:
    """Kill a process and everything below it, and wait until the descendants are gone; blocking.

    The process is stopped first, so that it starts nothing while the tree is walked; a descendant that forks meanwhile
    is found by the next walk. The process itself is left to its parent to reap.

    Args:
        pid: a child of this process that has not been reaped.
        within_s: seconds of trying, at most.

    Returns:
        Whether everything is gone.
    """
    _signal(pid, signal.SIGSTOP)
    deadline = time.monotonic() + within_s
    while alive := [child for child in descendants(pid) if not _is_zombie(child)]:
        for child in alive:
            _signal(child, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    _signal(pid, signal.SIGKILL)
    return not alive


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _is_zombie(pid: int) -> bool:
    """Tell whether a process is dead and waits to be reaped, or is gone already."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return stat.rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return True
