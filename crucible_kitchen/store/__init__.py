"""The run store: runs, their logs, artifacts and manifests, in SQLite or in memory.

``SqliteRunStore`` and its database packages are imported on first use. Read next: ``crucible_kitchen.store.base``.
"""

from typing import TYPE_CHECKING

from crucible_kitchen.lazy import lazily
from crucible_kitchen.store.base import FinalStatus, RunRecord, RunStatus, RunStore
from crucible_kitchen.store.memory import MemoryRunStore

if TYPE_CHECKING:
    from crucible_kitchen.store.sqlite import SqliteRunStore

__all__ = ["FinalStatus", "MemoryRunStore", "RunRecord", "RunStatus", "RunStore", "SqliteRunStore"]

__getattr__ = lazily(__name__, {"sqlite": ("SqliteRunStore",)})
