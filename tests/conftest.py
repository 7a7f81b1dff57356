"""Fixtures that every test has: the async backend, a home of its own, and a guard against anything left behind."""

import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

IDLE = ("AnyIO worker thread", "Trio thread", "asyncio_", "ThreadPoolExecutor")
"""Pool threads that run nobody's code; they are kept for the next call."""


PATIENCE = 5.0
"""Seconds that what was closed gets to be gone."""


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


@pytest.fixture
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary folders of a test stand in a place of their own, where nobody else's are taken for them."""
    place = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place))
        patch.setenv("TMPDIR", str(place))
        yield


def _threads() -> set[str]:
    return {f"{t.name} ({t.ident})" for t in threading.enumerate() if not t.name.startswith(IDLE)}


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


def _folders() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if "crucible" in name}


def _gone(look: Callable[[], set[str]], before: set[str]) -> set[str]:
    """Return what is still there of what came since; the other side of what was closed gets a moment to end."""
    end = time.monotonic() + PATIENCE
    while (left := look() - before) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return left


@pytest.fixture
def nothing_is_left_behind(own_temporary_folder: None) -> Iterator[None]:
    """Whatever a test starts is gone when it ends: threads, child processes, sockets, temporary folders.

    For suites whose tests share no server: its side of a connection closes when it likes. Tasks are held to it where
    runs are driven by hand. What fixtures of a wider scope opened before is not the test's.
    """
    looks = {"threads": _threads, "processes": _children, "sockets": _sockets, "folders": _folders}
    before = {what: look() for what, look in looks.items()}
    yield
    for what, look in looks.items():
        left = _gone(look, before[what])
        assert not left, f"{what} left behind: {sorted(left)}"
