"""The run store: runs, attempts, logs, records, checkpoints, artifacts and manifests, in SQLite or in memory.

``SqliteRunStore`` and its database packages are imported on first use. Read next: ``crucible_kitchen.store.base``.
"""

from typing import TYPE_CHECKING

from crucible_kitchen.lazy import lazily
from crucible_kitchen.store.base import TTL, RunStore
from crucible_kitchen.store.memory import MemoryRunStore
from crucible_kitchen.store.owner import Owner
from crucible_kitchen.store.records import Attempt, Checkpoint, FinalStatus, Lease, RunRecord, RunStatus, StageRecord

if TYPE_CHECKING:
    from crucible_kitchen.store.sqlite import SqliteRunStore

__all__ = [
    "TTL",
    "Attempt",
    "Checkpoint",
    "FinalStatus",
    "Lease",
    "MemoryRunStore",
    "Owner",
    "RunRecord",
    "RunStatus",
    "RunStore",
    "SqliteRunStore",
    "StageRecord",
]

__getattr__ = lazily(__name__, {"sqlite": ("SqliteRunStore",)})
