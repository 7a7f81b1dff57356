"""Requests to one sampler, put together: what is asked at the same time is one exchange, and one waits for all answers.

Connections cost more than samples: 64 requests of their own take a client longer than a small model takes to draw. No
task runs here: whoever waits does the next exchange for all, and if it is cancelled another goes on. Knows no sampling.
Read next: ``crucible_kitchen_http.sampler``.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel

from crucible_kitchen.errors import BackendError, CrucibleError
from crucible_kitchen.types import JsonObject
from crucible_kitchen.wire.codec import dumps
from crucible_kitchen_http.endpoint import Endpoint, accepted

__all__ = ["Batches"]

_WAIT = 30.0
"""Seconds that the server may hold a question for answers."""


@dataclass(eq=False, slots=True)
class _Request:
    """One request and what became of it; ``called`` is set when there is something to do for whoever waits for it."""

    body: bytes
    submitted: bool = False
    answer: JsonObject | None = None
    error: CrucibleError | None = None
    called: anyio.Event = field(default_factory=anyio.Event)

    @property
    def ended(self) -> bool:
        return self.answer is not None or self.error is not None

    async def wait(self) -> None:
        """Wait until it has ended, or an exchange is to be done."""
        await self.called.wait()
        self.called = anyio.Event()


class Batches:
    """The open requests to one sampling session.

    Args:
        endpoint: the server.
        name: of the sampling session.
    """

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self._endpoint = endpoint
        self._name = name
        self._open: dict[int, _Request] = {}
        self._received: list[int] = []
        self._submitting = False
        self._asking = False

    async def ask(self, number: int, body: JsonObject) -> JsonObject:
        """Send a request and return its answer; numbers are used once.

        Raises:
            CrucibleError: the request failed as the server tells, or the server cannot be reached.
        """
        request = self._open[number] = _Request(dumps(body | {"seq_id": number}))
        try:
            while not request.ended:
                if not (request.submitted or self._submitting):
                    await self._submit()
                elif request.submitted and not self._asking:
                    await self._fetch()
                else:
                    await request.wait()
        finally:
            del self._open[number]
            self._call_next()
        if request.error is not None:
            raise request.error
        assert request.answer is not None
        return accepted(request.answer)

    async def _submit(self) -> None:
        """Submit everything that waits; those who ask in the same turn of the loop come along."""
        self._submitting = True
        try:
            await anyio.lowlevel.checkpoint()
            batch = [r for r in self._open.values() if not r.submitted]
            head = dumps({"sampling_session_id": self._name, "type": "asample_batch"})
            data = head[:-1] + b',"requests":[' + b",".join(r.body for r in batch) + b"]}"
            if await self._shared(lambda: self._endpoint.post("asample_batch", data), batch) is not None:
                for request in batch:
                    request.submitted = True
        finally:
            self._submitting = False
            self._call_next()

    async def _fetch(self) -> None:
        """Wait for answers, to whichever requests come first."""
        self._asking = True
        try:
            received = self._received[:]
            question = {"sampling_session_id": self._name, "received": received, "wait": _WAIT}
            asked = [r for r in self._open.values() if r.submitted]
            told = await self._shared(lambda: self._endpoint.post("retrieve_samples", question), asked)
            if told is not None:
                self._received = self._received[len(received) :]
                self._take(told)
        finally:
            self._asking = False
            self._call_next()

    def _take(self, told: JsonObject) -> None:
        results = told.get("results")
        if not isinstance(results, dict):
            raise BackendError("the server's answer holds no results")
        for key, answer in results.items():
            number = int(key)
            self._received.append(number)
            if number in self._open:
                self._open[number].answer = answer
                self._open[number].called.set()

    async def _shared(
        self, exchange: "Callable[[], Awaitable[JsonObject]]", requests: list[_Request]
    ) -> JsonObject | None:
        """Do an exchange for several; when it fails it failed for all of them."""
        try:
            return await exchange()
        except CrucibleError as error:
            for request in requests:
                request.error = error
                request.called.set()
            return None

    def _call_next(self) -> None:
        """Call somebody to submit what waits, and somebody to ask for what was submitted, where nobody does.

        The others sleep on: to wake all of them after each exchange costs a client more than the exchange.
        """
        for submitted, busy in ((False, self._submitting), (True, self._asking)):
            if not busy:
                able = (r for r in self._open.values() if r.submitted == submitted and not r.ended)
                if (first := next(able, None)) is not None:
                    first.called.set()
