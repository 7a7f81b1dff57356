"""The one seam to threads and processes: blocking work leaves the event loop here and nowhere else.

``threads`` is for what blocks and always ends (files, hashing, torch, SQLite); ``processes`` is for what may not end (a
user's reward function, a blocking environment): it has a hard limit of time and can be killed. Read next:
``crucible_kitchen.ports``.
"""

from crucible_kitchen.workers.processes import ProcessLane as ProcessLane
from crucible_kitchen.workers.processes import ProcessPool as ProcessPool
from crucible_kitchen.workers.threads import Lane as Lane
from crucible_kitchen.workers.threads import PendingResult as PendingResult
from crucible_kitchen.workers.threads import Submissions as Submissions
from crucible_kitchen.workers.threads import inline as inline
from crucible_kitchen.workers.threads import is_inline as is_inline
from crucible_kitchen.workers.threads import run_sync as run_sync
from crucible_kitchen.workers.threads import waker as waker

__all__ = [
    "Lane",
    "PendingResult",
    "ProcessLane",
    "ProcessPool",
    "Submissions",
    "inline",
    "is_inline",
    "run_sync",
    "waker",
]
