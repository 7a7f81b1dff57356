"""A kitchen on noop adapters, in a home of the test's own."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.kitchen import Kitchen

NOOP = {
    "training_client": "noop",
    "dataset_store": "noop",
    "evaluator": "noop",
    "model_registry": "noop",
    "blob_store": "noop",
}
CONFIG = {
    "model": "noop",
    "dataset": "noop",
    "dataset_size": 40,
    "batch_size": 16,
    "eval_size": 8,
    "eval_max_tokens": 4,
}


@pytest.fixture
def noop() -> dict[str, str]:
    """A noop adapter for every port that the supervised workflow reads."""
    return dict(NOOP)


@pytest.fixture
def config() -> dict[str, Any]:
    """A run of three small steps."""
    return dict(CONFIG)


@pytest.fixture
def kitchen(home: Path) -> Kitchen:
    """A closed kitchen on noop adapters."""
    return Kitchen(NOOP, home=home)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test starts is gone when it ends; anyio's idle workers do not count."""
    before = set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - before if "AnyIO" not in t.name]
    assert not left, f"threads left behind: {left}"
