"""A run's memory in memory that dies at the n-th write, as a process that is killed there would.

For sweeps over every point at which a run can die: run with ``begin(n)``, then resume with ``begin()``. It knows no
store. Read next: ``crucible_kitchen.workflow.memory``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import anyio.lowlevel

from crucible_kitchen.errors import StoreError
from crucible_kitchen.events import Event, EventRecord
from crucible_kitchen.workflow.memory import Recorded, Saved

__all__ = ["MortalMemory"]


class MortalMemory:
    """The memory and the log of one run; what was written before it died is there in the next attempt.

    Example::

        memory = MortalMemory()
        context = RunContext("r", "w", seed=0, directory=path, recorder=memory.begin(7), memory=memory)
        await execute(workflow, config, adapters, context)      # raises StoreError at the eighth write
    """

    def __init__(self) -> None:
        self.attempt = 0
        self.writes = 0
        self.seq = 0
        self.events: list[Event] = []
        self.records: dict[str, Recorded] = {}
        self.saved: dict[int, Saved] = {}
        self._budget: int | None = None

    def begin(self, budget: int | None = None) -> "MortalMemory":
        """Begin the next attempt, which dies after so many writes; None: never."""
        self.attempt += 1
        self._budget = budget
        return self

    def _write(self) -> None:
        self.writes += 1
        if self._budget is not None:
            if self._budget <= 0:
                raise StoreError("the run is dead")
            self._budget -= 1

    def recall(self, path: str) -> Recorded | None:
        """See ``Memory``."""
        return self.records.get(path)

    def record(self, recorded: Recorded) -> None:
        """See ``Memory``; a place is recorded once."""
        self._write()
        assert recorded.path not in self.records, f"{recorded.path} is recorded twice"
        self.records[recorded.path] = replace(recorded, value=json.loads(json.dumps(recorded.value)))

    def checkpoints(self, session: str | None = None) -> Sequence[Saved]:
        """See ``Memory``."""
        kept = [saved for saved in self.saved.values() if session in (None, saved.session)]
        return sorted(kept, key=lambda saved: -saved.number)

    async def keep(self, saved: Saved) -> None:
        """See ``Memory``."""
        await anyio.lowlevel.checkpoint()
        self._write()
        self.saved[saved.number] = replace(saved, data=json.loads(json.dumps(saved.data)))

    async def forget(self, saved: Saved) -> None:
        """See ``Memory``."""
        await anyio.lowlevel.checkpoint()
        self.saved.pop(saved.number, None)

    def emit(self, event: Event) -> EventRecord:
        """See ``Recorder``."""
        self._write()
        self.seq += 1
        self.events.append(event)
        return EventRecord("r", self.seq, 0.0, event)

    async def sync(self) -> None:
        """See ``Recorder``."""
        await anyio.lowlevel.checkpoint()

    async def drain(self) -> None:
        """See ``Recorder``."""
        await anyio.lowlevel.checkpoint()
