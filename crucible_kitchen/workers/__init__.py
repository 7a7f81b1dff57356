"""The one seam to threads and processes: blocking work leaves the event loop here and nowhere else.

``threads`` is for what blocks and always ends (files, hashing, torch, SQLite); ``processes`` is for what may not end (a
user's reward function, a blocking environment): it has a hard limit of time and can be killed. Names are resolved when
they are first used: a worker process takes ``tree`` from here and should not pay for the rest. Read next:
``crucible_kitchen.ports``.
"""

from typing import TYPE_CHECKING

from crucible_kitchen.lazy import lazily

if TYPE_CHECKING:
    from crucible_kitchen.workers.processes import ProcessLane as ProcessLane
    from crucible_kitchen.workers.processes import ProcessPool as ProcessPool
    from crucible_kitchen.workers.threads import Lane as Lane
    from crucible_kitchen.workers.threads import PendingResult as PendingResult
    from crucible_kitchen.workers.threads import Submissions as Submissions
    from crucible_kitchen.workers.threads import inline as inline
    from crucible_kitchen.workers.threads import is_inline as is_inline
    from crucible_kitchen.workers.threads import run_sync as run_sync
    from crucible_kitchen.workers.threads import waker as waker

_HOMES = {
    "processes": ("ProcessLane", "ProcessPool"),
    "threads": ("Lane", "PendingResult", "Submissions", "inline", "is_inline", "run_sync", "waker"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - names are strings

__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
