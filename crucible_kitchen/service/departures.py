"""When answers leave that may travel together: as soon as waiting has cost what an exchange costs.

An exchange takes time from everything that is still computed; an answer that waits for others takes time from whoever
asked for it. Knows times, no answers. Read next: ``crucible_kitchen.service.samplers``.
"""

import math
from dataclasses import dataclass, field

import anyio

__all__ = ["Departure"]

_EXCHANGE = 0.002
"""Seconds that an exchange takes from each computation beside it, where client and server share a machine."""


@dataclass
class Departure:
    """When the answers that are there, and were not yet told, leave.

    They leave when the seconds that they have waited, all together, are those that their exchange takes from the
    computations still under way. While as many are under way, that costs at most twice what could be had by knowing
    when the others will come, and no rule without chance can promise better (Dooly, Goldman and Scott 2001, on
    acknowledgements of TCP). Beyond that, none waits longer than its own computation took, and none waits once nothing
    is computed.

    Attributes:
        answers: how many there are.
        leaves: when they leave, in the event loop's time; at once while there are none.
    """

    answers: int = 0
    leaves: float = -math.inf
    _waited: float = 0.0
    _since: float = 0.0
    _latest: float = math.inf
    _scopes: set[anyio.CancelScope] = field(default_factory=set)

    def add(self, now: float, took: float, others: int) -> None:
        """Take one answer more.

        Args:
            now: the event loop's time.
            took: seconds that it was computed.
            others: computations still under way.
        """
        self._waited += self.answers * (now - self._since)
        self._since = now
        self.answers += 1
        self._latest = min(self._latest, now + took)
        left = max(_EXCHANGE * others - self._waited, 0.0)
        self.leaves = min(self._latest, now + left / self.answers)
        for scope in self._scopes:
            scope.deadline = self.leaves

    async def wait(self) -> None:
        """Wait until they leave; answers that are added meanwhile can bring that forward."""
        with anyio.CancelScope(deadline=self.leaves) as scope:
            self._scopes.add(scope)
            try:
                await anyio.sleep_forever()
            finally:
                self._scopes.remove(scope)
