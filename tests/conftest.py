"""Fixtures that every test has: the async backend, a home of its own, and a guard against anything left behind."""

import functools
import gc
import inspect
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest

PATIENCE = 5.0
"""Seconds that what was closed gets to be gone."""

POOL = {"threading", "queue", "anyio._backends._asyncio", "concurrent.futures.thread", "trio._core._thread_cache"}
"""Modules in which an idle thread of a pool waits for its next call."""

WAITING = {"wait", "_worker", "_work"}
"""The functions of theirs that it stands in."""


@pytest.fixture
def anyio_backend() -> str:
    """Adapters and the kitchen run on asyncio; engine tests override this with both backends."""
    return "asyncio"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state directory of the test's own, as ``--home`` would be."""
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Temporary folders stand in a place of these tests' own, where nobody else's are taken for them."""
    place = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place))
        patch.setenv("TMPDIR", str(place))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torch")))  # torch makes it, for all tests
        yield place


def _threads() -> set[str]:
    """Return the threads that run somebody's code."""
    frames = sys._current_frames()
    running = [t for t in threading.enumerate() if t.ident in frames and not _idle(frames[t.ident])]
    return {f"{t.name} ({t.ident})" for t in running}


def _idle(frame: FrameType) -> bool:
    """Return whether a thread of a pool waits for its next call, given the innermost frame that it stands in."""
    within = {outer.f_globals.get("__name__") for outer, _ in traceback.walk_stack(frame)}
    return within <= POOL and frame.f_code.co_name in WAITING


def _children() -> set[str]:
    """Return this process's children, where the system says so; what has ended and was waited for is none."""
    found: set[str] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found.update(task.read_text().split())
    return found


def _sockets() -> set[str]:
    """Return the open sockets of this process, where the system says so."""
    found: set[str] = set()
    with suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:"):
                    found.add(target)
    return found


def _gone(look: Callable[[], set[str]], before: set[str]) -> set[str]:
    """Return what is still there of what came since; the other side of what was closed gets a moment to end."""
    end = time.monotonic() + PATIENCE
    while (left := look() - before) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return left


@pytest.fixture
def threads_of_others() -> tuple[str, ...]:
    """Names of threads that come up during a test and are not the test's; who shares a server overrides this."""
    return ("tqdm_monitor",)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(temporary_folder: Path, threads_of_others: tuple[str, ...]) -> Iterator[None]:
    """Whatever a test starts is gone when it ends: running threads, child processes, sockets, temporary folders.

    What fixtures of a wider scope opened before is not the test's.
    """
    looks: dict[str, Callable[[], set[str]]] = {
        "threads": lambda: {name for name in _threads() if not name.startswith(threads_of_others)},
        "processes": _children,
        "sockets": _sockets,
        "temporary folders": lambda: set(os.listdir(temporary_folder)),
    }
    before = {what: look() for what, look in looks.items()}
    yield
    for what, look in looks.items():
        left = _gone(look, before[what])
        assert not left, f"{what} left behind: {sorted(left)}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Let no coroutine of a test end before the tasks that it started."""
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        pyfuncitem.obj = _without_tasks_left(pyfuncitem.obj)
    return (yield)


def _without_tasks_left(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def held(**arguments: Any) -> None:
        before = {task.id for task in anyio.get_running_tasks()}
        await test(**arguments)
        left = [task for task in anyio.get_running_tasks() if task.id not in before]
        assert not left, f"tasks left behind: {left}"

    return held
