"""A proxy between a client and a server on the loopback interface that loses, delays, doubles, swaps and cuts messages.

What happens to the k-th message is given by a seed. Knows HTTP/1.1 with lengths, nothing of what is said. Read next:
``crucible_kitchen.testing.faults``.
"""

import random
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

import anyio
import anyio.abc

__all__ = ["FAULTS", "Fault", "FaultyProxy"]

Fault: TypeAlias = Literal["drop_request", "drop_reply", "delay", "duplicate", "reorder", "cut_request", "cut_reply"]

FAULTS: tuple[Fault, ...] = (
    "drop_request",
    "drop_reply",
    "delay",
    "duplicate",
    "reorder",
    "cut_request",
    "cut_reply",
)

_SOON = 0.02


class FaultyProxy:
    """Forwards HTTP to a server, with faults. Use :meth:`open`.

    Args:
        port: of the server.
        rate: the share of messages that something happens to.
        seed: of what happens.
        faults: which of them.

    Attributes:
        url: where clients connect.
        done: how often each fault happened.
    """

    def __init__(self, port: int, rate: float, seed: int, faults: Sequence[Fault] = FAULTS) -> None:
        self._server = port
        self._rate = rate
        self._random = random.Random(seed)
        self._faults = tuple(faults)
        self._passed = anyio.Event()
        self._group: anyio.abc.TaskGroup
        self.url = ""
        self.done: Counter[Fault] = Counter()

    def point_to(self, port: int) -> None:
        """Forward to another server from now on."""
        self._server = port

    def let_pass(self) -> None:
        """Do nothing to messages from now on."""
        self._rate = 0.0

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["FaultyProxy", None]:
        """Listen inside the block."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"  # noqa: S610 - not Django
        async with listener, anyio.create_task_group() as self._group:
            self._group.start_soon(listener.serve, self._handle)
            try:
                yield self
            finally:
                self._group.cancel_scope.cancel()

    async def _handle(self, client: anyio.abc.SocketStream) -> None:
        """Serve one connection until one side ends it, or a fault does."""
        async with client:
            try:
                while (request := await _message(client)) is not None:
                    fault = self._random.choice(self._faults) if self._random.random() < self._rate else None
                    if fault is not None:
                        self.done[fault] += 1
                    reply = await self._exchanged(request, fault)
                    if reply is None:
                        return
                    await client.send(reply)
                    if fault == "cut_reply":
                        return
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError):
                return

    async def _exchanged(self, request: bytes, fault: Fault | None) -> bytes | None:
        """Return what the client gets; None ends its connection."""
        if fault == "drop_request":
            return None
        if fault == "cut_request":
            await self._forward(request[: len(request) // 2], whole=False)
            return None
        if fault == "duplicate":
            self._group.start_soon(self._later, request)
        if fault == "delay":
            await anyio.sleep(3 * _SOON)
        if fault == "reorder":  # until another message has passed
            with anyio.move_on_after(5 * _SOON):
                await self._passed.wait()
        reply = await self._forward(request)
        passed, self._passed = self._passed, anyio.Event()
        passed.set()
        if reply is None or fault == "drop_reply":
            return None
        return reply[: len(reply) // 2] if fault == "cut_reply" else reply

    async def _later(self, request: bytes) -> None:
        """Send a message once more, after others."""
        await anyio.sleep(_SOON)
        await self._forward(request)

    async def _forward(self, request: bytes, *, whole: bool = True) -> bytes | None:
        """Send a message over a connection of its own; return the reply, None if there is none."""
        try:
            async with await anyio.connect_tcp("127.0.0.1", self._server) as server:
                await server.send(request)
                return await _message(server) if whole else None
        except (anyio.BrokenResourceError, anyio.EndOfStream, OSError):
            return None


async def _message(stream: anyio.abc.ByteReceiveStream) -> bytes | None:
    """Read one request or reply whose length is stated; None if the stream ended before."""
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            data += await stream.receive()
        except anyio.EndOfStream:
            return None
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        body += await stream.receive()
    return head + b"\r\n\r\n" + body
