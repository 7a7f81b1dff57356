"""The groups of one update, as the learner takes them: in the order of arrival, and again as often as it asks.

It asks the pipeline for groups and knows nothing of where they come from. Read next: ``crucible_kitchen.rl.pipeline``.
"""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Generic, TypeVar

from crucible_kitchen.rl.plan import Rolled

if TYPE_CHECKING:
    from crucible_kitchen.rl.pipeline import Rollouts

__all__ = ["Batch"]

G = TypeVar("G", bound=Rolled)


class Batch(Generic[G]):
    """The groups of one update, as they arrive; iterating again gives the same ones first.

    Args:
        rollouts: where they come from.
        update: which update, from 0: the version of the policy that it starts from.
        over: it was trained before a restart, and has no groups.
    """

    def __init__(self, rollouts: "Rollouts[G]", update: int, *, over: bool = False) -> None:
        self.rollouts = rollouts
        self.update = update
        self.groups: list[G] = []
        self._over = over

    def __len__(self) -> int:
        """Return how many groups it will have."""
        return 0 if self._over else self.rollouts.plan.per_batch

    def __aiter__(self) -> AsyncIterator[G]:
        """Iterate over the groups in the order of arrival; those that are there already come first."""
        return _Groups(self)

    async def all(self) -> list[G]:
        """Return all groups, in the order of drawing, once they are there."""
        async for _ in self:
            pass
        return sorted(self.groups, key=lambda group: group.ticket.index)

    def trained(self) -> None:
        """See ``Rollouts.trained``; call it when the update has been taken and its sampler published."""
        if not self._over:
            self._over = True
            self.rollouts.trained(self)


class _Groups(AsyncIterator[G]):
    """One pass over a batch's groups."""

    def __init__(self, batch: Batch[G]) -> None:
        self._batch = batch
        self._at = 0

    async def __anext__(self) -> G:
        batch, at = self._batch, self._at
        if at == len(batch.groups):
            if at >= len(batch):
                raise StopAsyncIteration
            batch.groups.append(await batch.rollouts.take(batch))
        self._at += 1
        return batch.groups[at]
