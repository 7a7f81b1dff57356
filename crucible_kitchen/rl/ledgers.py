"""The two ledgers: where every problem went, and where every second went. Both add up, or the run stops.

They know numbers only. Read next: ``crucible_kitchen.rl.pipeline``.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from crucible_kitchen.errors import LedgerBroken
from crucible_kitchen.types import JsonObject

__all__ = ["RolloutLedger", "TimeLedger"]


@dataclass(slots=True)
class RolloutLedger:
    """Counts what became of every problem: drawn = trained + dropped + buffered + in flight.

    The left side and the first two of the right are counted here as they happen; the last two are the sizes of what
    really is in the queue and at the workers.

    Attributes:
        drawn: problems drawn.
        trained: groups whose gradient was submitted and whose update was taken.
        dropped: groups given up, by reason.
        requeued: problems drawn again after a restart; they were drawn once.
    """

    drawn: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    requeued: int = 0

    def check(self, *, buffered: int, in_flight: int) -> None:
        """Check the law.

        Raises:
            LedgerBroken: it does not hold.
        """
        found = self.trained + self.dropped.total() + buffered + in_flight
        if found != self.drawn:
            raise LedgerBroken(
                f"{self.drawn} problems were drawn, but {self.trained} trained, {self.dropped.total()} dropped, "
                f"{buffered} buffered and {in_flight} in flight make {found}"
            )

    def to_json(self) -> JsonObject:
        """Return the counts."""
        counts = {"drawn": self.drawn, "trained": self.trained, "requeued": self.requeued}
        return counts | {"dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, values: JsonObject) -> "RolloutLedger":
        """Return a ledger that goes on from counts."""
        return cls(values["drawn"], values["trained"], Counter(values["dropped"]), values["requeued"])


class TimeLedger:
    """Gives every second of one worker exactly one cause; the causes add up to the wall clock by construction.

    Args:
        now: the loop's clock.
        cause: what it does at first.
        earlier: seconds by cause that it goes on from, of a run that is resumed.
    """

    __slots__ = ("_began", "_cause", "_earlier", "_now", "_since", "_spent")

    def __init__(self, now: Callable[[], float], cause: str, earlier: Mapping[str, float] | None = None) -> None:
        self._now = now
        self._cause = cause
        self._began = self._since = now()
        self._spent = dict(earlier or {})
        self._earlier = sum(self._spent.values())

    @property
    def cause(self) -> str:
        """What it does now."""
        return self._cause

    def enter(self, cause: str) -> None:
        """Do something else from now on."""
        now = self._now()
        self._spent[self._cause] = self._spent.get(self._cause, 0.0) + now - self._since
        self._cause, self._since = cause, now

    @property
    def wall(self) -> float:
        """Seconds since it began, and those it went on from."""
        return self._earlier + self._now() - self._began

    def spent(self) -> Mapping[str, float]:
        """Return seconds by cause, up to now."""
        self.enter(self._cause)
        return dict(self._spent)
