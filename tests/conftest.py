"""Fixtures that every test has: the async backend, a home of its own, and a guard against anything left behind."""

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

IDLE = ("AnyIO worker thread", "Trio thread", "asyncio_", "ThreadPoolExecutor")
"""Pool threads that run nobody's code; they are kept for the next call."""


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
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary folders of this session stand in a place of their own, where nobody else's are taken for them."""
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


def _sockets() -> Counter[str]:
    """Return the open sockets of this process, where the system says so."""
    found: Counter[str] = Counter()
    with suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:"):
                    found[target] += 1
    return found


def _folders() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if "crucible" in name}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Whatever a test starts is gone when it ends: threads, child processes, temporary folders.

    Tasks are held to it in the suites that start some. What fixtures of a wider scope opened before is not the test's.
    """
    before = _threads(), _children(), _folders()
    yield
    after = _threads(), _children(), _folders()
    for what, was, now in zip(("threads", "processes", "folders"), before, after, strict=True):
        assert not now - was, f"{what} left behind: {sorted(now - was)}"


@pytest.fixture(autouse=True)
def no_socket_is_left_behind() -> Iterator[None]:
    """No socket either. A module whose tests share a server says otherwise: the server's side closes when it likes."""
    before = _sockets()
    yield
    left = _sockets() - before
    assert not left, f"sockets left behind: {sorted(left)}"
