"""What every adapter of every port has in common. Read next: the port itself."""

from typing import Protocol

from crucible_kitchen.types import JsonObject

__all__ = ["Adapter"]


class Adapter(Protocol):
    """The part of an adapter that the kitchen itself uses.

    An adapter is constructed with keyword options only and does no work in its constructor: no file, no socket, no
    import of a heavy package. If its constructor has a parameter ``home`` (a ``pathlib.Path``), the kitchen gives it
    the directory below which embedded adapters keep their files. Methods may be called concurrently.
    """

    @property
    def synthetic(self) -> bool:
        """Whether its numbers are made up (noop adapters); promotion refuses what stands on them."""
        ...

    def public_options(self) -> JsonObject:
        """Return the options that may stand in a manifest: no secret, no credential."""
        ...

    async def aclose(self) -> None:
        """Release what the adapter holds. Idempotent."""
        ...
