"""The jail: runs one program at a time, watches its limits, and ends it as a whole. Runs in a worker process.

Whatever the program does, the report comes from here: what it printed is data, never a verdict. It knows no
environment. Read next: ``confine.py``, what the program's process does to itself first, and ``sandbox.py``, which asks.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from crucible_kitchen.workers.tree import descendants
from crucible_kitchen_environments.confine import NOBODY, Ends, become_monitor, become_program

__all__ = ["run"]

_TICK_S = 0.02
_STDERR_BYTES = 16 << 10
_GO_BYTE = b"g"


def run(program: str, stdin: str, isolation: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Run a Python program and report how it ended.

    Args:
        program: its text.
        stdin: what it reads.
        isolation: ``namespaces`` or ``limits-only``.
        limits: ``seconds``, ``cpu``, ``memory``, ``disk``, ``output``, ``processes``, ``files``.

    Returns:
        ``ended`` (``exited``, ``time``, ``memory``, ``output``, ``processes`` or ``refused``), ``exit_code``,
        ``stdout``, ``stderr``, ``seconds``, ``reason`` where it was refused.
    """
    held = _Held(limits, stdin.encode())
    directory = tempfile.mkdtemp(prefix="crucible-program-") if isolation == "limits-only" else ""
    try:
        held.start(program, isolation, directory)
        held.watch()
    finally:
        held.end()
        if directory:
            shutil.rmtree(directory, ignore_errors=True)
    return held.report()


class _Held:
    """One program, from its start to its report."""

    def __init__(self, limits: dict[str, Any], stdin: bytes) -> None:
        self._limits = limits
        self._input = memoryview(stdin)
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._status = bytearray()
        self._facts: dict[str, Any] = {}
        self._ended = ""
        self._began = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._ours: dict[str, int] = {}
        self._child = 0
        self._running = True

    def start(self, program: str, isolation: str, directory: str) -> None:
        """Fork the program's process."""
        pipes = {name: os.pipe() for name in ("stdin", "stdout", "stderr", "status", "go")}
        writing = ("stdin", "go")  # the pipes whose other end is the child's reading one
        theirs = {name: pair[0 if name in writing else 1] for name, pair in pipes.items()}
        self._ours = {name: pair[1 if name in writing else 0] for name, pair in pipes.items()}
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            for end in self._ours.values():
                os.close(end)
            ends = Ends(**theirs)
            if isolation == "limits-only":
                become_program(ends, parent, program, self._limits, directory)
            become_monitor(ends, parent, program, self._limits)
        for end in theirs.values():
            os.close(end)
        for name in ("stdin", "stdout", "stderr", "status"):
            os.set_blocking(self._ours[name], False)
            event = selectors.EVENT_WRITE if name == "stdin" else selectors.EVENT_READ
            self._selector.register(self._ours[name], event, name)
        self._ours["end"] = os.pidfd_open(self._child)
        self._selector.register(self._ours["end"], selectors.EVENT_READ, "end")

    def watch(self) -> None:
        """Move its input and output until it has ended or exceeds a limit."""
        deadline = self._began + self._limits["seconds"]
        while self._running and not self._ended:
            for key, _ in self._selector.select(_TICK_S):
                self._move(key.data)
            if time.monotonic() > deadline:
                self._ended = "time"
            self._weigh()

    def _move(self, name: str) -> None:
        """Write some input, or read some output."""
        if name == "end":
            self._running = False
            return
        if name == "stdin":
            self._feed()
            return
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._ours[name], 1 << 16)
            if not data:
                self._close(name)
        if name == "status":
            self._listen(data)
        elif name == "stderr":
            self._output[name] += data[: max(0, _STDERR_BYTES - len(self._output[name]))]
        else:
            self._output[name] += data
            if len(self._output[name]) > self._limits["output"]:
                self._ended = "output"

    def _feed(self) -> None:
        try:
            self._input = self._input[os.write(self._ours["stdin"], self._input[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._input = self._input[:0]
        if not self._input:
            self._close("stdin")

    def _listen(self, data: bytes) -> None:
        """Take in what monitor and init say."""
        self._status += data
        while b"\n" in self._status:
            line, _, self._status = self._status.partition(b"\n")
            fact = json.loads(line)
            self._facts.update(fact)
            if "unshared" in fact:
                self._map_identities()
                os.write(self._ours["go"], _GO_BYTE)

    def _map_identities(self) -> None:
        """Give the new user namespace its one user; a root's program becomes nobody outside, too."""
        place = Path(f"/proc/{self._child}")
        try:
            if os.geteuid() == 0:
                (place / "uid_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                (place / "gid_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            else:
                (place / "uid_map").write_text(f"{NOBODY} {os.geteuid()} 1\n")
                (place / "setgroups").write_text("deny")
                (place / "gid_map").write_text(f"{NOBODY} {os.getegid()} 1\n")
        except OSError as error:
            self._facts["refused"] = f"the identities of the user namespace: {error}"

    def _weigh(self) -> None:
        """Hold all its processes together to the limits of memory and number."""
        below = descendants(self._facts.get("init", self._child))
        if len(below) > self._limits["processes"] + 2:
            self._ended = "processes"
        elif len(below) > 1 and sum(map(_memory, below)) > self._limits["memory"]:  # one alone has RLIMIT_AS
            self._ended = "memory"

    def _close(self, name: str) -> None:
        end = self._ours.pop(name)
        if name != "go":
            self._selector.unregister(end)
        os.close(end)

    def end(self) -> None:
        """Kill and reap all that is left, and take in the last of the output."""
        while True:
            for pid in reversed(descendants(os.getpid())):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:  # none is left
                break
            if pid == self._child and "init" not in self._facts:
                self._facts |= {"exit_code": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime}
            if pid == 0:
                time.sleep(0.001)
        for name in ("status", "stdout", "stderr"):
            while name in self._ours and not self._ended:
                self._move(name)
        for name in list(self._ours):
            self._close(name)
        self._selector.close()

    def report(self) -> dict[str, Any]:
        """Say how it ended."""
        refused = self._facts.get("refused", "")
        if not self._ended and refused:
            self._ended = "refused"
        elif not self._ended:
            # What is reported falls short of the limit that the kernel killed for: its two clocks are not one.
            killed = self._facts.get("exit_code") in (-signal.SIGKILL, -signal.SIGXCPU)
            spent = killed and self._facts["cpu"] > 0.5 * self._limits["cpu"]
            self._ended = "time" if spent else "exited"
        return {
            "ended": self._ended,
            "exit_code": self._facts.get("exit_code") if self._ended == "exited" else None,
            "stdout": self._output["stdout"][: self._limits["output"]].decode(errors="replace"),
            "stderr": self._output["stderr"].decode(errors="replace"),
            "seconds": time.monotonic() - self._began,
            "reason": refused,
        }


def _memory(pid: int) -> int:
    """Return a process's proportional share of memory in bytes; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0
