"""The sandbox: runs programs that a model wrote, apart from everything, under limits on everything.

Each program runs in new user, process, network, mount, IPC and host-name namespaces: its root is an empty file system
with a read-only view of the Python interpreter, it has no network, no rights, no environment of ours, and dies as a
whole. Where the kernel does not allow that, the sandbox refuses to start. It returns what a program printed; what that
is worth is decided by whoever asked. Read next: ``jail.py``, which runs in the sandbox's worker processes.
"""

import sys
from dataclasses import dataclass
from typing import Literal, TypeAlias

from crucible_kitchen.errors import SandboxUnavailable, WorkerDied
from crucible_kitchen.workers import ProcessPool

__all__ = ["Execution", "Isolation", "Limits", "Sandbox"]

Isolation: TypeAlias = Literal["namespaces", "limits-only"]

_JAIL = "crucible_kitchen_environments.jail:run"
_SLACK_S = 30.0  # beyond the program's own time, for a jail on a busy machine


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: of wall-clock time, its start included.
        cpu_seconds: of processor time, whole ones.
        memory_bytes: address space of each process, and memory of all together.
        disk_bytes: all files in its ``/tmp``, its only writable place.
        output_bytes: of standard output; a program that prints more is ended.
        processes: processes and threads at once.
        open_files: file descriptors of each process.
    """

    seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        """Refuse limits that are none.

        Raises:
            ValueError: a limit is not positive.
        """
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"the limit {name}={getattr(self, name)!r} is not positive")


@dataclass(frozen=True, slots=True)
class Execution:
    """How a program ended.

    Attributes:
        ended: ``exited`` by itself (also by an exception or a signal), or by the limit that it exceeded.
        exit_code: as the shell knows it, negative for a signal; None if a limit ended it.
        stdout: what it printed, cut at the limit; bytes that are no UTF-8 are replaced.
        stderr: its beginning.
        seconds: of wall-clock time.
    """

    ended: Literal["exited", "time", "memory", "output", "processes"]
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """A place where programs run, several at once.

    Cancelling a run kills its program. ``aclose`` kills them all and leaves no process, file or mount.

    Args:
        isolation: ``namespaces``; or ``limits-only``, which keeps limits, empty environment and the filter of system
            calls (no sockets, no processes), but lets a program read what this user may read.
        workers: programs at once.
        limits: of each program.

    Example::

        async with Sandbox() as sandbox:
            ran = await sandbox.run("print(int(input()) * 2)", "21")
            assert int(ran.stdout) == 42
    """

    def __init__(self, *, isolation: Isolation = "namespaces", workers: int = 2, limits: Limits | None = None) -> None:
        self._isolation = isolation
        self._limits = limits or Limits()
        self._pool = ProcessPool("sandbox", size=workers, timeout=60.0, environment={})

    async def start(self) -> None:
        """Run a program that prints one word, to see that programs can be run here.

        Raises:
            SandboxUnavailable: they cannot.
        """
        if sys.platform != "linux":
            raise SandboxUnavailable(f"programs can be run on Linux only, not on {sys.platform}")
        ran = await self.run("print('ready')")
        if (ran.ended, ran.stdout) != ("exited", "ready\n"):
            raise SandboxUnavailable(
                f"a program that prints one word ended by {ran.ended!r}, exit code {ran.exit_code}: {ran.stderr[:300]}",
                hint="raise the sandbox's limits",
            )

    async def run(self, program: str, stdin: str = "", *, limits: Limits | None = None) -> Execution:
        """Run a Python program to its end and return how it ended.

        Raises:
            SandboxUnavailable: the kernel refused to isolate it; it has not run.
            WorkerDied: the jail itself ended.
        """
        use = limits or self._limits
        asked = {
            "seconds": use.seconds,
            "cpu": use.cpu_seconds,
            "memory": use.memory_bytes,
            "disk": use.disk_bytes,
            "output": use.output_bytes,
            "processes": use.processes,
            "files": use.open_files,
        }
        report = await self._pool.call(_JAIL, program, stdin, self._isolation, asked, timeout=use.seconds + _SLACK_S)
        reason = report.pop("reason")
        if report["ended"] == "refused":
            raise self._refusal(reason)
        return Execution(**report)

    def _refusal(self, reason: str) -> SandboxUnavailable | WorkerDied:
        if self._isolation == "limits-only":
            return WorkerDied(f"a program could not be started: {reason}")
        return SandboxUnavailable(
            f"this kernel does not let programs be isolated: {reason}",
            hint="sandbox='limits-only' runs them with limits, but lets them read what this user may read",
        )

    async def aclose(self) -> None:
        """Kill everything. Idempotent."""
        await self._pool.aclose()

    async def __aenter__(self) -> "Sandbox":
        """Start, and refuse where programs cannot be isolated."""
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
