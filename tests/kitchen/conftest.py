"""A kitchen on noop adapters, in a home of the test's own."""

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
