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
from crucible_kitchen_http.endpoint import Endpoint, accepted

__all__ = ["Batches"]

_WAIT = 30.0
"""Seconds that the server may hold a question for answers."""

_MOST = 4096
"""Requests in one exchange; the server takes no more."""


@dataclass(eq=False, slots=True)
class _Request:
    """One request and what became of it; ``called`` is set when there is something to do for whoever waits for it."""

    body: bytes
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
        self._new: dict[int, _Request] = {}
        self._left: dict[int, _Request] = {}  # new, and there was no room for them: who asks next takes them along
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
            for requests in (self._new, self._left, self._sent):
                requests.pop(number, None)
            self._call_next()
        if request.error is not None:
            raise request.error
        assert request.answer is not None
        return accepted(request.answer)

    async def _ask(self) -> None:
        """Wait for answers, to whichever requests come first; what is new goes along."""
        self._asking = True
        try:
            received = self._received[:]
            await self._exchange({"received": received, "wait": _WAIT})
            self._received = self._received[len(received) :]
        finally:
            self._asking = False

    async def _submit(self) -> None:
        """Submit what is new, while another waits for answers."""
        self._submitting = True
        try:
            while self._new and self._asking:
                await self._exchange({})
        finally:
            self._submitting = False

    async def _exchange(self, question: JsonObject) -> None:
        """Send what is new with a question; those who come in the same turn of the loop come along."""
        await anyio.lowlevel.checkpoint()
        if question:
            self._new, self._left = self._left | self._new, {}
        batch = dict(islice(self._new.items(), _MOST))
        if not batch and not question:
            return
        for number in batch:
            self._sent[number] = self._new.pop(number)
        self._call_next()
        head = dumps({"sampling_session_id": self._name, "type": "asample_batch"} | question)
        data = head[:-1] + b',"requests":[' + b",".join(r.body for r in batch.values()) + b"]}"
        try:
            self._take(await self._endpoint.post("asample_batch", data))
        except CrucibleError as error:
            # What the server refuses is what was new; anything else is as true for what it draws.
            refused = batch if batch and isinstance(error, BackendUserError) else dict(self._sent)
            for number, request in refused.items():
                self._sent.pop(number, None)
                request.end(error=error)
        except BaseException:
            again = {number: request for number, request in batch.items() if number in self._sent}
            self._new = again | self._new
            self._sent = {number: request for number, request in self._sent.items() if number not in again}
            raise

    def _take(self, told: JsonObject) -> None:
        results = told.get("results")
        if not isinstance(results, dict):
            raise BackendError("the server's answer holds no results")
        for number in told.get("left", ()):
            if (request := self._sent.pop(number, None)) is not None:
                self._left[number] = request
        for key, answer in results.items():
            number = int(key)
            self._received.append(number)
            if (request := self._sent.pop(number, None)) is not None:
                request.end(answer=answer)

    def _call_next(self) -> None:
        """Call somebody to ask for answers, or to submit what is new, where nobody does.

        The others sleep on: to wake all of them after each exchange costs a client more than the exchange.
        """
        asking = () if self._asking else chain(self._sent.values(), self._left.values())
        able = chain(asking, () if self._submitting else self._new.values())
        if (first := next(able, None)) is not None:
            first.called.set()
