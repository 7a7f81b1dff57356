"""A run's memory, kept in the run store: what the engine records, and what a later attempt finds.

It turns the engine's values into the store's and back; the engine knows no store, the store no engine. Read next:
``crucible_kitchen.workflow.memory``, ``crucible_kitchen.store``.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict

from crucible_kitchen.events import WarningRaised
from crucible_kitchen.store import Checkpoint, Lease, RunStore, StageRecord
from crucible_kitchen.telemetry import EventLog
from crucible_kitchen.types import StateRef
from crucible_kitchen.workflow.memory import Recorded, Saved

__all__ = ["History"]


class History:
    """The memory of one attempt. Made by :meth:`begun` for a new run, by :meth:`found` for one that goes on.

    Args:
        lease: the attempt's.
        store: where everything is kept.
        log: the attempt's log.
    """

    def __init__(self, lease: Lease, store: RunStore, log: EventLog) -> None:
        self._lease = lease
        self._store = store
        self._log = log
        self._records: dict[str, Recorded] = {}
        self._checkpoints: list[Saved] = []

    @classmethod
    async def found(cls, lease: Lease, store: RunStore, log: EventLog) -> "History":
        """Read what earlier attempts left; a checkpoint whose record is damaged is left out, and the log says so."""
        history = cls(lease, store, log)
        for record in await store.records(lease.run_id):
            history._records[record.path] = Recorded(record.path, record.input_hash, record.output_hash, record.value)
        for kept in await store.checkpoints(lease.run_id):
            if kept.damaged:
                text = f"the record of the checkpoint of step {kept.step} is damaged; the one before is used"
                log.emit(WarningRaised(code="checkpoint.damaged", message=text, path=kept.session))
                await store.drop_checkpoint(lease.run_id, kept.number)
                continue
            history._checkpoints.append(_saved(kept))
        return history

    @property
    def attempt(self) -> int:
        """See ``Memory``."""
        return self._lease.epoch

    @property
    def seq(self) -> int:
        """See ``Memory``."""
        return self._log.seq

    def recall(self, path: str) -> Recorded | None:
        """See ``Memory``."""
        return self._records.get(path)

    def record(self, recorded: Recorded) -> None:
        """See ``Memory``."""
        self._store.record(
            StageRecord(
                self._lease.run_id,
                recorded.path,
                recorded.input_hash,
                recorded.output_hash,
                recorded.value,
                self._log.seq,
            )
        )

    def checkpoints(self, session: str | None = None) -> Sequence[Saved]:
        """See ``Memory``."""
        return [saved for saved in self._checkpoints if session in (None, saved.session)]

    async def keep(self, saved: Saved) -> None:
        """See ``Memory``."""
        await self._store.put_checkpoint(
            Checkpoint(
                self._lease.run_id,
                saved.number,
                saved.session,
                saved.place,
                saved.step,
                self._lease.epoch,
                saved.seq,
                time.time(),
                saved.data,
                {path: asdict(state) for path, state in saved.states.items()},
            )
        )
        self._checkpoints.insert(0, saved)

    async def forget(self, saved: Saved) -> None:
        """See ``Memory``."""
        await self._store.drop_checkpoint(self._lease.run_id, saved.number)
        self._checkpoints = [kept for kept in self._checkpoints if kept.number != saved.number]


def _saved(kept: Checkpoint) -> Saved:
    states = {path: StateRef(**state) for path, state in kept.states.items()}
    return Saved(kept.number, kept.session, kept.place, kept.step, kept.data, states, kept.seq)
