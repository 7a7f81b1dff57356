"""What is to run, as data: child specs, supervisor specs, and how often and how fast children are restarted.

It knows nothing of tasks or clocks. Read next: ``crucible_kitchen.actors.supervisor``.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from crucible_kitchen.actors.actor import Actor
from crucible_kitchen.errors import ConfigError

__all__ = ["ChildSpec", "Restarts", "Spec", "SupervisorSpec", "Window"]

M = TypeVar("M")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often the children of one supervisor may die, and how long each waits before it is started again.

    The wait before a child's n-th restart within the window is ``min(longest, initial * factor ** (n - 1))``, of which
    a random part of at most ``jitter`` is taken away.

    Attributes:
        most: deaths within the window that are answered with a restart; one more, and the supervisor gives up.
        within: length of the window in seconds; a death exactly that long ago still counts.
        initial: seconds before the first restart.
        factor: what each further wait is multiplied by.
        longest: seconds that no wait exceeds.
        jitter: the part of a wait that is left to chance, 0 to 1.

    Raises:
        ConfigError: a value is out of range, or a child that always dies at once would never exceed ``most``, because
            its waits are longer than the window.
    """

    most: int = 3
    within: float = 60.0
    initial: float = 0.1
    factor: float = 2.0
    longest: float = 30.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        _at_least("most", self.most, 0)
        _at_least("initial", self.initial, 0)
        _at_least("factor", self.factor, 1)
        _at_least("longest", self.longest, 0)
        if not 0 <= self.jitter <= 1:
            raise ConfigError(f"jitter is {self.jitter}, not between 0 and 1")
        waits = sum(self._longest_delay(n) for n in range(1, self.most + 1))
        if waits > self.within:
            raise ConfigError(
                f"{self.most} restarts may take {waits:g} s of waiting, more than the window of {self.within:g} s",
                hint="raise within, or lower most, initial or longest",
            )

    def delay(self, nth: int, rng: random.Random) -> float:
        """Return the seconds before a child's n-th restart within the window, counted from 1."""
        return self._longest_delay(nth) * (1 - self.jitter * rng.random())

    def _longest_delay(self, nth: int) -> float:
        # The exponent is bounded: a float overflows at 2 ** 1024, and no wait needs to get that far.
        return min(self.longest, self.initial * self.factor ** min(nth - 1, 64))


class Window:
    """The deaths of a supervisor's children that still count."""

    def __init__(self, restarts: Restarts) -> None:
        self._restarts = restarts
        self._deaths: deque[tuple[float, str]] = deque()

    def died(self, name: str, now: float) -> int | None:
        """Count a death; return how many of this child's still count, or None if there are too many altogether."""
        while self._deaths and self._deaths[0][0] < now - self._restarts.within:
            self._deaths.popleft()
        if len(self._deaths) >= self._restarts.most:
            return None
        self._deaths.append((now, name))
        return sum(dead == name for _, dead in self._deaths)

    def clear(self) -> None:
        """Forget all deaths: the supervisor itself was restarted."""
        self._deaths.clear()


@dataclass(frozen=True, slots=True)
class ChildSpec(Generic[M, R]):
    """One actor: how it is made, and what becomes of it when it dies or is to stop.

    Attributes:
        name: its name among its siblings, without a slash.
        factory: makes the actor anew for every incarnation; gives it all it needs.
        restart: ``permanent``: it is restarted when it dies; ``temporary``: it is not, and its name is free again.
        capacity: messages its mailbox holds; whoever has one more waits.
        grace: seconds it has for what its mailbox still holds, and again for its ``stop``, before it is cancelled.
        drain: whether it still handles what its mailbox holds when the block of the tree ends well.
        quarantine_after: incarnations that one message may kill before it is not delivered again.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str
    factory: Callable[[], Actor[M, R]]
    restart: Literal["permanent", "temporary"] = "permanent"
    capacity: int = 16
    grace: float = 30.0
    drain: bool = True
    quarantine_after: int = 2

    def __post_init__(self) -> None:
        _check_name(self.name)
        _at_least("capacity", self.capacity, 1)
        _at_least("grace", self.grace, 0)
        _at_least("quarantine_after", self.quarantine_after, 1)


@dataclass(frozen=True, slots=True)
class SupervisorSpec:
    """A supervisor and its children, in the order in which they start; they stop in the opposite order.

    Attributes:
        name: its name among its siblings, without a slash.
        children: actors and supervisors below it, each ready before the next begins; more can be started later.
        strategy: ``one_for_one``: a child that died is restarted alone. ``rest_for_one``: those that started after it
            are stopped and restarted with it, in order.
        restarts: how often and how fast.
        seed: what the jitter of the waits is drawn from, together with each child's path.

    Raises:
        ConfigError: two children have one name.
    """

    name: str
    children: "tuple[Spec, ...]" = ()
    strategy: Literal["one_for_one", "rest_for_one"] = "one_for_one"
    restarts: Restarts = field(default_factory=Restarts)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_name(self.name)
        names = [child.name for child in self.children]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"supervisor {self.name!r} has two children named {twice[0]!r}")


Spec: TypeAlias = ChildSpec[Any, Any] | SupervisorSpec


def _check_name(name: str) -> None:
    if not name or "/" in name:
        raise ConfigError(f"{name!r} cannot be the name of a child", hint="names are not empty and have no slash")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name} is {value}, less than {least}")
