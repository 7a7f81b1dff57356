"""Fixtures that every test has: the async backend, and a home of its own."""

from pathlib import Path

import pytest


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
