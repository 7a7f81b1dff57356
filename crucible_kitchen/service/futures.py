"""Results that are asked for later: each has an id, is kept until it was fetched, and for a while after.

Knows bytes, not what they mean. Read next: ``crucible_kitchen.service.models``.
"""

import secrets
from collections import OrderedDict

import anyio

from crucible_kitchen.errors import NotFoundError, SessionLost
from crucible_kitchen.types import JsonObject
from crucible_kitchen.wire.codec import dumps
from crucible_kitchen.wire.failures import failure_to_wire

__all__ = ["Future", "Futures"]


class Future:
    """A call whose result is not there yet, or is."""

    __slots__ = ("_waited_for", "body", "done", "fetched", "id", "scope")

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.done = False
        self.body = b""
        self.fetched = False
        self.scope: anyio.CancelScope | None = None
        self._waited_for: anyio.Event | None = None

    def resolve(self, body: JsonObject | bytes) -> None:
        """Give the result; only the first counts."""
        if not self.done:
            self.body = body if isinstance(body, bytes) else dumps(body)
            self.done = True
            if self._waited_for is not None:
                self._waited_for.set()

    def fail(self, error: Exception) -> None:
        """Give an error as the result."""
        self.resolve(failure_to_wire(error))

    async def wait(self) -> None:
        """Wait until the result is there."""
        if not self.done:
            self._waited_for = self._waited_for or anyio.Event()
            await self._waited_for.wait()

    @property
    def taken(self) -> JsonObject:
        """What a submission is answered with."""
        return {"request_id": self.id}


class Futures:
    """All futures of a server's life, of which so many were ``created``.

    A fetched result is kept while there is room, so that a reply that was lost can be asked for again. An id from an
    earlier life is answered as lost.

    Args:
        keep_bytes: room for fetched results.
    """

    def __init__(self, keep_bytes: int = 1 << 26) -> None:
        self._life = secrets.token_hex(6)
        self.created = 0
        self._open: dict[str, Future] = {}
        self._fetched: OrderedDict[str, Future] = OrderedDict()
        self._kept = 0
        self._keep_bytes = keep_bytes

    def create(self) -> Future:
        """Return a new future."""
        self.created += 1
        future = Future(f"{self._life}-{self.created}")
        self._open[future.id] = future
        return future

    def find(self, request_id: str) -> Future:
        """Return a future by its id.

        Raises:
            SessionLost: it is of an earlier life of the server, or its result was fetched and has made room for others.
            NotFoundError: there was never such a request.
        """
        found = self._open.get(request_id) or self._fetched.get(request_id)
        if found is not None:
            return found
        life, _, number = request_id.partition("-")
        if len(life) != len(self._life) or not number.isdecimal():
            raise NotFoundError("there is no such request")
        raise SessionLost("the request is lost: the server has restarted or let go of it", hint="submit it again")

    async def wait(self, request_id: str, seconds: float) -> bytes | None:
        """Return a result once it is there, None if it is not in time."""
        future = self.find(request_id)
        with anyio.move_on_after(seconds):
            await future.wait()
        if not future.done:
            return None
        self._keep(future)
        return future.body

    def _keep(self, future: Future) -> None:
        if self._open.pop(future.id, None) is not None:
            future.fetched = True
            self._kept += len(future.body)
            self._fetched[future.id] = future
        self._fetched.move_to_end(future.id)
        while self._kept > self._keep_bytes and len(self._fetched) > 1:
            _, oldest = self._fetched.popitem(last=False)
            self._kept -= len(oldest.body)
            oldest.body = b""

    def release(self, future: Future) -> None:
        """Treat the result of a finished call as fetched: whoever waits for it is gone, or has it."""
        if future.id in self._open and future.done:
            self._keep(future)

    def end(self) -> None:
        """Answer everything that is still open as lost: the server ends."""
        for future in self._open.values():
            future.fail(SessionLost("the server has ended"))
