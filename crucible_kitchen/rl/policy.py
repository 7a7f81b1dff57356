"""The policy that is being rolled out: which sampler is current, and which old ones are still in use.

Knows samplers, not what they are used for. Read next: ``crucible_kitchen.rl.rollout``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import anyio

__all__ = ["PublishedPolicy"]


class Closable(Protocol):
    """A sampler or a policy over observations."""

    async def aclose(self) -> None:
        """Release it."""
        ...


S = TypeVar("S", bound=Closable)


class _Lease(Generic[S]):
    __slots__ = ("sampler", "users", "version")

    def __init__(self, sampler: S, version: int) -> None:
        self.sampler = sampler
        self.version = version
        self.users = 0


class PublishedPolicy(Generic[S]):
    """The current sampler and its version, which counts published updates from 0.

    A replaced sampler is closed once nobody uses it any more: a request that began under old weights ends under them.
    """

    def __init__(self, sampler: S, version: int = 0) -> None:
        self._now: _Lease[S] = _Lease(sampler, version)
        self._old: list[_Lease[S]] = []

    @property
    def version(self) -> int:
        """The current version."""
        return self._now.version

    @contextmanager
    def current(self) -> Iterator[tuple[S, int]]:
        """Use the current sampler; it stays open during the block."""
        lease = self._now
        lease.users += 1
        try:
            yield lease.sampler, lease.version
        finally:
            lease.users -= 1

    async def publish(self, sampler: S, version: int) -> None:
        """Make a sampler the current one, and close those that nobody uses any more."""
        self._old.append(self._now)
        self._now = _Lease(sampler, version)
        idle = [lease for lease in self._old if not lease.users]
        self._old = [lease for lease in self._old if lease.users]
        for lease in idle:
            await lease.sampler.aclose()

    async def aclose(self) -> None:
        """Close all samplers."""
        with anyio.CancelScope(shield=True):
            for lease in (*self._old, self._now):
                await lease.sampler.aclose()
        self._old = []
