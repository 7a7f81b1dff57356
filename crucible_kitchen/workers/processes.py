"""Worker processes: user code that may hang, crash or block, under a hard limit of wall-clock time.

Nothing is pickled: a function is named by its import path (``module:function``), arguments and results are JSON over
pipes. A call that does not end in time is killed with everything it started, and the next call finds a new process.
Read next: ``child.py``, which runs in the process, and ``tree.py``, which kills it.
"""

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from crucible_kitchen.errors import WorkerDied, WorkerRaised, WorkerTimeout
from crucible_kitchen.redaction import redacted
from crucible_kitchen.types import Json
from crucible_kitchen.waits import waiting
from crucible_kitchen.workers import child
from crucible_kitchen.workers.threads import is_inline
from crucible_kitchen.workers.tree import end_tree

__all__ = ["ProcessLane", "ProcessPool"]

_START_S = 60.0  # imports of the interpreter itself, on a machine that is busy
_GRACE_S = 5.0  # for a killed process to be gone
_MOST_BYTES = 64 << 20  # of one answer
_CHILD = str(Path(child.__file__).resolve())


def _search_path() -> list[str]:
    """Return where this process finds modules, so that the worker finds the same."""
    return [str(Path(entry).absolute()) for entry in sys.path]


class ProcessLane:
    """One worker process that does one call at a time, and keeps its modules' state between them.

    The process starts with the first call. Cancelling a call that runs, or a call that exceeds its time, kills the
    process with everything below it; the next call starts a new one, which knows nothing of what the old one knew:
    ``starts`` counts them. Under :func:`inline` calls run in this process at once, without a limit.

    Args:
        name: for messages.
        timeout: seconds a call may take, unless it says otherwise; the start of the process does not count.
        environment: the process's environment variables; None gives it this process's own.

    Example::

        async with ProcessLane("reward", timeout=10.0) as lane:
            reward = await lane.call("my_package.rewards:score", prompt, answer)
    """

    def __init__(self, name: str, *, timeout: float, environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._timeout = timeout
        self._environment = environment
        self._turn = anyio.Lock()
        self._process: anyio.abc.Process | None = None
        self._answers: BufferedByteReceiveStream | None = None
        self._closed = False
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The process's id, None while there is no process."""
        return self._process.pid if self._process is not None else None

    async def call(self, function: str, *arguments: Json, timeout: float | None = None) -> Json:
        """Call ``module:function`` in the process and return its result.

        Raises:
            WorkerTimeout: it did not return in time; it was killed.
            WorkerRaised: it raised, or its result is not JSON.
            WorkerDied: the process ended.
        """
        if self._closed:
            raise RuntimeError(f"the lane {self._name!r} is closed")
        if is_inline():
            await anyio.lowlevel.checkpoint()
            return child.resolve(function)(*arguments)
        request = json.dumps({"function": function, "arguments": arguments}).encode() + b"\n"
        async with self._turn:
            limit = self._timeout if timeout is None else timeout
            try:
                await self._ensure_started()
                with waiting("process", f"{self._name}: {function}"):
                    return await self._ask(function, request, limit)
            except WorkerRaised:
                raise
            except BaseException:
                await self._end()
                raise

    async def _ask(self, function: str, request: bytes, limit: float) -> Json:
        try:
            with anyio.fail_after(limit):
                answer = await self._exchange(request)
        except TimeoutError:
            raise WorkerTimeout(
                f"{function} did not return within {limit:g} s; its process was killed",
                hint="raise the time limit if it only needs longer",
            ) from None
        if "error" in answer:
            place, said = f" at {answer['place']}" if answer["place"] else "", redacted(answer["message"])
            raise WorkerRaised(f"{function} raised {answer['error']}{place}: {said}", answer["error"])
        return answer["result"]

    async def _exchange(self, request: bytes) -> dict[str, Any]:
        """Send a line and wait for the line that answers it."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._answers is not None
        try:
            await self._process.stdin.send(request)
            line = await self._answers.receive_until(b"\n", _MOST_BYTES)
        except anyio.DelimiterNotFound:
            raise WorkerDied(f"the worker {self._name!r} answered more than {_MOST_BYTES >> 20} MiB") from None
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, anyio.IncompleteRead):
            raise WorkerDied(f"the worker process {self._name!r} ended {await self._fate()}") from None
        return json.loads(line)  # type: ignore[no-any-return]

    async def _fate(self) -> str:
        assert self._process is not None
        with anyio.move_on_after(_GRACE_S, shield=True):
            code = await self._process.wait()
            return f"with exit code {code}" if code >= 0 else f"by signal {-code}"
        return "without closing"

    async def _ensure_started(self) -> None:
        if self._process is not None and self._process.returncode is None:
            return
        await self._end()
        # Shielded: a cancellation between the fork and the assignment would leave a process that nobody knows.
        with anyio.CancelScope(shield=True):
            process = await anyio.open_process(
                [sys.executable, "-P", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None,
                env=self._environment,
                start_new_session=True,
            )
            self._process = process
        assert process.stdout is not None
        self._answers = BufferedByteReceiveStream(process.stdout)
        self.starts += 1
        opening = json.dumps({"path": _search_path(), "parent": os.getpid()})
        try:
            with anyio.fail_after(_START_S):
                await self._exchange(opening.encode() + b"\n")
        except TimeoutError:
            raise WorkerDied(f"the worker process {self._name!r} did not start within {_START_S:g} s") from None

    async def _end(self) -> None:
        """Kill the process, if there is one, with everything below it, and wait until it is gone."""
        process, self._process, self._answers = self._process, None, None
        if process is None:
            return
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                await anyio.to_thread.run_sync(end_tree, process.pid)
            with anyio.move_on_after(_GRACE_S):
                await process.wait()
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await process.aclose()

    async def aclose(self) -> None:
        """Kill the process, if one runs. Idempotent."""
        self._closed = True
        await self._end()

    async def __aenter__(self) -> "ProcessLane":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class ProcessPool:
    """So many worker processes that are alike; each call takes a free one, and waits its turn when none is.

    A killed process frees its place at once; the time limit of a call begins when it has a place.

    Args:
        name: for messages.
        size: processes, at most; each starts when it is first needed.
        timeout: seconds a call may take, unless it says otherwise.
        environment: the processes' environment variables; None gives them this process's own.
    """

    def __init__(self, name: str, *, size: int, timeout: float, environment: Mapping[str, str] | None = None) -> None:
        if size < 1:
            raise ValueError(f"a pool needs one process or more, not {size}")
        self._lanes = [ProcessLane(f"{name}-{i}", timeout=timeout, environment=environment) for i in range(size)]
        self._idle = list(reversed(self._lanes))
        self._places = anyio.Semaphore(size)

    @property
    def busy(self) -> int:
        """How many processes are at work."""
        return len(self._lanes) - len(self._idle)

    @asynccontextmanager
    async def lane(self) -> AsyncGenerator[ProcessLane, None]:
        """Take a process for several calls that belong together."""
        async with self._places:
            lane = self._idle.pop()  # the one used last: it has its modules
            try:
                yield lane
            finally:
                self._idle.append(lane)

    async def call(self, function: str, *arguments: Json, timeout: float | None = None) -> Json:
        """Call ``module:function`` in a free process; see :meth:`ProcessLane.call`."""
        async with self.lane() as lane:
            return await lane.call(function, *arguments, timeout=timeout)

    async def aclose(self) -> None:
        """Kill all processes. Idempotent."""
        with anyio.CancelScope(shield=True):
            for lane in self._lanes:
                await lane.aclose()

    async def __aenter__(self) -> "ProcessPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
