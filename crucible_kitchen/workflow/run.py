"""``Run``: what a stage can ask about the run it is part of, and what all stages of a run share.

A stage gets it by naming a parameter ``run``. It knows no adapter and no node. Read next:
``crucible_kitchen.workflow.engine``.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from crucible_kitchen.errors import RunChanged
from crucible_kitchen.events import (
    Event,
    EventRecord,
    StageErrored,
    StageStart,
    StageStop,
    StallDetected,
    WarningRaised,
    WorkflowStop,
)
from crucible_kitchen.redaction import redacted
from crucible_kitchen.types import BlobRef, JsonObject
from crucible_kitchen.waits import Waits
from crucible_kitchen.workflow.memory import Keep, Made, Memory, Recorded

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Recorder", "Run", "RunContext", "StateView"]

T = TypeVar("T")

_STRUCTURE = (StageStart, StageStop, StageErrored, StallDetected, WorkflowStop)
"""Events whose durations describe the run, not the model."""


class Recorder(Protocol):
    """Where events go: the run's log."""

    def emit(self, event: Event) -> EventRecord:
        """Append an event; never blocks."""
        ...

    async def sync(self) -> None:
        """Return once everything emitted so far is durable; a checkpoint even if it is already."""
        ...

    async def drain(self) -> None:
        """Return once few enough events wait to be written; a checkpoint even if none does."""
        ...


@dataclass(slots=True)
class RunContext:
    """What all stages of one run share.

    Attributes:
        id: the run's id.
        recipe: the workflow or recipe it was started as.
        seed: the run's seed.
        directory: where the run may keep files of its own; exists.
        recorder: the run's log.
        manifest: facts for lineage: config hash, versions, adapters and their capabilities.
        artifacts: what the run produced, in order.
        metrics: the last value of each measurement, ``"training.step.loss"``.
        waits: who waits for what, while the run is under way.
        memory: what earlier attempts left; None: the run is not durable.
        draining: the run is to stop at its next checkpoint.
        allowed: what may differ from how the run began, because somebody said so: config keys, ``dataset``...
    """

    id: str
    recipe: str
    seed: int
    directory: Path
    recorder: Recorder
    manifest: JsonObject = field(default_factory=dict)
    artifacts: list[BlobRef] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    waits: Waits | None = None
    memory: Memory | None = None
    draining: bool = False
    allowed: frozenset[str] = frozenset()

    def emit(self, event: Event) -> EventRecord:
        """Append an event to the log and keep its measurements as the run's latest."""
        if self.waits is not None:
            self.waits.count += 1  # whatever happens is a movement
        if event.measurements and not isinstance(event, _STRUCTURE):
            self.metrics |= measured(event)
        return self.recorder.emit(event)

    def add_artifact(self, artifact: BlobRef) -> None:
        """List an artifact among what the run produced; the same one again takes the place of the first."""
        self.artifacts = [a for a in self.artifacts if a != artifact] + [artifact]

    def drop_artifact(self, artifact: BlobRef) -> None:
        """Take an artifact that is gone off the list."""
        self.artifacts = [a for a in self.artifacts if a != artifact]

    def made(self, metrics: Mapping[str, float], artifacts: Sequence[JsonObject]) -> None:
        """Take over what an earlier attempt measured and produced."""
        self.metrics |= metrics
        for artifact in artifacts:
            self.add_artifact(BlobRef(**artifact))


def measured(event: Event) -> dict[str, float]:
    """Return an event's measurements of data and model, ``{"training.step.loss": 0.1}``."""
    if isinstance(event, _STRUCTURE):
        return {}
    return {f"{event.name}.{name}": getattr(event, name) for name in event.measurements}


@dataclass(frozen=True, slots=True)
class Run:
    """The run as one stage sees it.

    Attributes:
        path: the stage's place with the loops' turns: ``supervised/epoch[0]/batch[3]/train_step``.
        turns: index of the current turn by loop name.
        attempt: which try of the stage this is, from 1.
        made: what this try has left so far.
    """

    context: RunContext
    path: str
    turns: Mapping[str, int]
    attempt: int = 1
    made: Made = field(default_factory=Made)

    @property
    def id(self) -> str:
        """The run's id."""
        return self.context.id

    @property
    def recipe(self) -> str:
        """What the run was started as."""
        return self.context.recipe

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.context.seed

    @property
    def directory(self) -> Path:
        """A directory of the run's own; it exists."""
        return self.context.directory

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Facts for lineage: config hash, versions, adapters."""
        return self.context.manifest

    @property
    def idempotency_key(self) -> str:
        """The same for every try of this stage at this place, also after a crash; for effects outside the run."""
        return hashlib.sha256(f"{self.context.id}:{self.path}".encode()).hexdigest()[:32]

    def turn(self, loop: str) -> int:
        """Return the index, from 0, of the enclosing loop's current turn.

        Raises:
            LookupError: the stage stands in no loop of this name.
        """
        if loop not in self.turns:
            raise LookupError(f"{self.path} stands in no loop {loop!r}; loops here: {', '.join(self.turns) or 'none'}")
        return self.turns[loop]

    def rng(self, name: str = "") -> "np.random.Generator":
        """Return a generator that depends on the run's seed, this place and ``name`` only."""
        import numpy as np

        return np.random.Generator(np.random.Philox(key=seed_of(self.context.seed, self.path, name)))

    def emit(self, event: Event) -> None:
        """Append an event to the run's log."""
        self.made.metrics |= measured(event)
        self.context.emit(event)

    def warn(self, code: str, message: str) -> None:
        """Tell people something that does not stop the run."""
        self.context.emit(WarningRaised(code=code, message=redacted(message), path=self.path))

    def add_artifact(self, artifact: BlobRef) -> None:
        """List an artifact among the run's results."""
        self.made.artifacts.append(asdict(artifact))
        self.context.add_artifact(artifact)

    def pin(self, name: str, value: str) -> None:
        """State a fact of the outside world that the run depends on: later attempts must find the same.

        Args:
            name: what it is called where it may be allowed to differ, ``dataset`` for instance.
            value: a hash or a version.

        Raises:
            RunChanged: an earlier attempt found something else.
        """
        memory = self.context.memory
        if memory is None:
            return
        place = f"{self.path}#{name}"
        pinned = memory.recall(place)
        if pinned is None:
            memory.record(Recorded(place, ":", "", {"pin": value}))
        elif pinned.value["pin"] != value and name not in self.context.allowed:
            raise RunChanged(self.id, {name: (pinned.value["pin"], value)})

    def checkpoint(self, keep: Keep | None = None) -> None:
        """Ask for a checkpoint once this stage has ended well.

        It covers the block that opened the outermost session, and is written while training goes on. Where no session
        is open that recovers by rollback there is nothing to do: every stage is a record there.
        """
        self.made.checkpoint = keep or Keep()


def seed_of(seed: int, path: str, name: str) -> int:
    """Return a 128-bit seed derived from the run's seed, a place and a name."""
    digest = hashlib.sha256(f"{seed}:{path}:{name}".encode()).digest()
    return int.from_bytes(digest[:16], "big")


class StateView:
    """A read-only view of what the stages wrote, by attribute or by item."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no stage wrote {name!r}; written: {', '.join(self._values) or 'nothing'}") from None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("the state of a run is read-only")

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"StateView({', '.join(self._values)})"

    def get(self, name: str, kind: type[T]) -> T:
        """Return a value as a given type.

        Raises:
            KeyError: nobody wrote it.
            TypeError: it is of another type.
        """
        value = self._values[name]
        if not isinstance(value, kind):
            raise TypeError(f"{name!r} is a {type(value).__name__}, not a {kind.__name__}")
        return value
