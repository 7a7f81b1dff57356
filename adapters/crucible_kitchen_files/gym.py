"""Problems of the ``reasoning-gym`` package as a source of rows: ``reasoning_gym:<name>``.

It knows that package and nothing else of ours than errors. Read next: ``crucible_kitchen_files.datasets``.
"""

import difflib
import hashlib
from collections.abc import Mapping
from typing import Any

from crucible_kitchen.errors import ConfigError, DatasetNotFound, EmptyDataset, MissingExtra
from crucible_kitchen.types import Row

__all__ = ["PREFIX", "gym_rows"]

PREFIX = "reasoning_gym:"
_TRAIN, _HELD_OUT = 1_000, 100
_SHARES = {"test": range(1), "validation": range(1, 2), "train": range(2, 20)}  # of 20 parts, by the question's hash


def gym_rows(name: str, split: str, *, limit: int, seed: int, options: Mapping[str, str]) -> list[Row]:
    """Make the rows of one split: ``question`` and ``answer``.

    A problem's split is decided by the hash of its question, so no question is in two splits, whatever the seeds.

    Args:
        name: the task's name in the package, without the prefix.
        split: ``train``, ``validation`` or ``test``.
        limit: at most this many rows; 0 for 1,000 (training) or 100.
        seed: of the problems.
        options: the task's own settings, as text; numbers and booleans are recognised.

    Raises:
        MissingExtra: the package is not installed.
        DatasetNotFound: it has no such task, or there is no such split.
        ConfigError: the task refused a setting.
        EmptyDataset: the task has no problem for this split.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingExtra("reasoning-gym", "envs") from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(repr(PREFIX + n) for n in near)}?" if near else None
        raise DatasetNotFound(f"reasoning-gym has no task {name!r}", hint=hint)
    if split not in _SHARES:
        raise DatasetNotFound(f"{PREFIX}{name} has no split {split!r}", hint=f"its splits: {', '.join(_SHARES)}")
    wanted = limit or (_TRAIN if split == "train" else _HELD_OUT)
    most = wanted * 20 // len(_SHARES[split]) * 3 + 100  # three times what it takes on average
    settings = {key: _value(text) for key, text in options.items()}
    try:
        problems = reasoning_gym.create_dataset(name, seed=seed, size=most, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{PREFIX}{name} refused its dataset_options: {error}") from error
    rows = _matching(problems, split, wanted, most)
    if not rows:
        raise EmptyDataset(f"{PREFIX}{name} has no problem for the split {split!r}")
    return rows


def _matching(problems: Any, split: str, wanted: int, most: int) -> list[Row]:
    rows: list[Row] = []
    for i in range(most):
        entry = problems[i]
        question, answer = entry["question"], entry["answer"]
        part = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 20
        if part in _SHARES[split] and answer is not None:  # some problems have many answers and name none
            rows.append({"question": question, "answer": str(answer)})
            if len(rows) == wanted:
                break
    return rows


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
