"""Requests to one sampler, put together: what is asked at the same time is one exchange, and one waits for all answers.

Connections cost more than samples: 64 requests of their own take a client longer than a small model takes to draw. No
task runs here: whoever waits does the next exchange for all, and if it is cancelled another goes on. Knows no sampling.
Read next: ``crucible_kitchen_http.sampler``.
"""

from dataclasses import dataclass, field
from itertools import chain, islice

import anyio
import anyio.lowlevel

from crucible_kitchen.errors import BackendError, BackendUserError, CrucibleError
from crucible_kitchen.types import JsonObject
from crucible_kitchen.wire.codec import dumps
from crucible_kitchen.wire.messages import MOST_REQUESTS
from crucible_kitchen_http.endpoint import Endpoint, accepted

__all__ = ["Batches"]

_WAIT = 30.0
"""Seconds that the server may hold a question for answers."""

_BYTES = 1 << 22
"""Of the requests in one exchange, unless one alone has more."""


@dataclass(eq=False, slots=True)
class _Request:
    """One request and what became of it.

    Attributes:
        body: as JSON.
        alone: it was refused together with others: next time it goes by itself.
        waits: whoever asked for it does nothing else.
        called: set when there is something to do for them.
    """

    body: bytes
    alone: bool = False
    waits: bool = False
    answer: JsonObject | None = None
    error: CrucibleError | None = None
    called: anyio.Event = field(default_factory=anyio.Event)

    @property
    def ended(self) -> bool:
        return self.answer is not None or self.error is not None

    def end(self, *, answer: JsonObject | None = None, error: CrucibleError | None = None) -> None:
        """Give what became of it."""
        self.answer, self.error = answer, error
        self.called.set()

    async def wait(self) -> None:
        """Wait until it has ended, or an exchange is to be done."""
        self.waits = True
        try:
            await self.called.wait()
        finally:
            self.waits = False
        self.called = anyio.Event()


class Batches:
    """The open requests to one sampling session, each in one of three places.

    ``_new`` is to be sent, ``_left`` was and there was no room for it, ``_sent`` is drawn as far as anybody knows.

    Args:
        endpoint: the server.
        name: of the sampling session.
    """

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self._endpoint = endpoint
        self._name = name
        self._new: dict[int, _Request] = {}
        self._left: dict[int, _Request] = {}
        self._sent: dict[int, _Request] = {}
        self._received: list[int] = []
        self._submitting = False
        self._asking = False

    async def ask(self, number: int, body: JsonObject) -> JsonObject:
        """Send a request and return its answer; numbers are used once.

        Raises:
            CrucibleError: the request failed as the server tells, or the server cannot be reached.
        """
        request = self._new[number] = _Request(dumps(body | {"seq_id": number}))
        try:
            while not request.ended:
                if not self._asking:
                    await self._ask()
                elif number in self._new and not self._submitting:
                    await self._submit()
                else:
                    await request.wait()
        finally:
            self._pop(number)
            self._call_next()
        if request.error is not None:
            raise request.error
        assert request.answer is not None
        return accepted(request.answer)

    async def _ask(self) -> None:
        """Wait for answers, to whichever requests come first; what is new goes along, and what there is room for."""
        self._asking = True
        try:
            await anyio.lowlevel.checkpoint()  # those who come in the same turn of the loop come along
            received = self._received[:]
            batch = self._take_along(len(received) or 1)  # only what was received makes room
            await self._exchange(batch, {"received": received, "wait": _WAIT})
        finally:
            self._asking = False

    async def _submit(self) -> None:
        """Submit what is new, while another waits for answers."""
        self._submitting = True
        try:
            await anyio.lowlevel.checkpoint()
            if batch := self._take_along(0):
                await self._exchange(batch, {})
        finally:
            self._submitting = False
            self._call_next()

    def _take_along(self, most_left: int) -> dict[int, _Request]:
        """Return requests that go with the next exchange; from now on they count as sent."""
        batch: dict[int, _Request] = {}
        size = 0
        for number, request in chain(islice(self._left.items(), most_left), self._new.items()):
            size += len(request.body)
            if batch and (request.alone or size > _BYTES or len(batch) == MOST_REQUESTS):
                break
            batch[number] = request
            if request.alone:
                break
        for number, request in batch.items():
            self._pop(number)
            self._sent[number] = request
        self._call_next()
        return batch

    async def _exchange(self, batch: dict[int, _Request], question: JsonObject) -> None:
        """Send requests with a question, and see to what is answered."""
        head = dumps({"sampling_session_id": self._name, "type": "asample_batch"} | question)
        data = head[:-1] + b',"requests":[' + b",".join(r.body for r in batch.values()) + b"]}"
        try:
            self._take(await self._endpoint.post("asample_batch", data), question)
        except CrucibleError as error:
            if batch and isinstance(error, BackendUserError):  # it is about what was new
                self._refuse(batch, error)
            else:
                self._end(self._sent | self._left, error)
        except BaseException:
            self._again(batch)
            raise

    def _refuse(self, batch: dict[int, _Request], error: CrucibleError) -> None:
        """End a request that was refused; of several nobody knows which is meant, so each goes by itself."""
        if len(batch) == 1:
            self._end(batch, error)
            return
        for request in batch.values():
            request.alone = True
        self._again(batch)

    def _end(self, requests: dict[int, _Request], error: CrucibleError) -> None:
        for number, request in requests.items():
            if self._pop(number) is not None:
                request.end(error=error)

    def _again(self, batch: dict[int, _Request]) -> None:
        """Take back what was sent and may not have arrived, except for what was answered meanwhile."""
        self._new = {number: self._sent.pop(number) for number in batch if number in self._sent} | self._new

    def _take(self, told: JsonObject, question: JsonObject) -> None:
        results = told.get("results")
        if not isinstance(results, dict):
            raise BackendError("the server's answer holds no results")
        self._received = self._received[len(question.get("received", ())) :]
        for number in told.get("left", ()):
            if (request := self._sent.pop(number, None)) is not None:
                self._left[number] = request
        for key, answer in results.items():
            number = int(key)
            self._received.append(number)
            if (request := self._pop(number)) is not None:
                request.end(answer=answer)

    def _pop(self, number: int) -> _Request | None:
        """Take a request out of its place; None if its answer came before, or whoever asked is gone."""
        for requests in (self._sent, self._left, self._new):
            if (request := requests.pop(number, None)) is not None:
                return request
        return None

    def _call_next(self) -> None:
        """Call somebody to ask for answers, or to submit what is new, where nobody does.

        The others sleep on: to wake all of them after each exchange costs a client more than the exchange.
        """
        asking = () if self._asking else chain(self._sent.values(), self._left.values())
        able = chain(asking, () if self._submitting else self._new.values())
        if (first := next((request for request in able if request.waits), None)) is not None:
            first.called.set()
