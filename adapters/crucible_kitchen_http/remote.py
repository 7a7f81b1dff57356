"""A model on a server: its numbered calls, and what is sent again when the server has lost it.

The calls since the last saved state are kept. When a server has restarted, the model is made again: created, the last
saved state loaded, the kept calls sent once more. What the server computes is a function of these, so that the weights
come out as they would have. Knows the wire, not the port. Read next: ``crucible_kitchen_http.session``.
"""

from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field

import anyio

from crucible_kitchen.errors import (
    BackendUserError,
    CapabilityError,
    CrucibleError,
    NotFoundError,
    SessionLost,
    TransientBackendError,
)
from crucible_kitchen.types import JsonObject, StateRef
from crucible_kitchen.wire.codec import dumps
from crucible_kitchen_http.endpoint import Endpoint

__all__ = ["Call", "RemoteModel", "Start"]

Place = tuple[int, int]
"""An accumulation: index of the optimizer step, and which try of it."""

_REVIVALS = 5
"""How often a model is made again for one call."""


@dataclass(eq=False)
class Call:
    """One numbered call.

    Attributes:
        path: the wire's verb.
        body: the message as JSON, without the model's id and the call's number.
        place: the accumulation it belongs to, for calls that change one.
        ended: set when its result has arrived.
        request_id: what the server knows it by.
        before: for saves and loads, the kept calls that were sent before.
    """

    path: str
    body: bytes
    place: Place | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    request_id: str = ""
    before: "list[Call]" = field(default_factory=list)

    @classmethod
    def of(cls, path: str, body: JsonObject, place: Place | None = None) -> "Call":
        """Return a call; encodes the message, which blocks if it is large."""
        return cls(path, dumps(body), place)


@dataclass(frozen=True)
class Start:
    """What a model's kept calls start from: a saved state, or only its weights."""

    state: StateRef
    optimizer: bool = True

    @property
    def step(self) -> int:
        """Optimizer steps that the model then has behind it."""
        return self.state.step if self.optimizer else 0

    def call(self) -> Call:
        """Return the call that loads it."""
        return Call.of("load_weights", {"path": self.state.uri, "optimizer": self.optimizer, "type": "load_weights"})


@dataclass
class RemoteModel:
    """One model on a server.

    Attributes:
        endpoint: the server.
        creation: the message that creates the model, without the session's id.
        start: what the model was last known to be as a whole; None: as it was created.
        extended: whether the server's extensions of the wire are used.
    """

    endpoint: Endpoint
    creation: JsonObject
    start: Start | None = None
    extended: bool = False
    session_id: str = ""
    model_id: str = ""
    kept: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._life = 0
        self._number = 0
        self._models = 0
        self._sending = anyio.Lock()
        self._poisoned: CrucibleError | None = None
        self._doomed: list[StateRef] = []
        self._left = 0

    @property
    def kept_bytes(self) -> int:
        """Size of the calls that would be sent again."""
        return sum(len(call.body) for call in self.kept)

    async def create(self) -> None:
        """Make a session and the model on the server.

        Raises:
            CapabilityError: the server does not know the extensions that are to be used.
        """
        opened = await self.endpoint.post(
            "create_session",
            {"tags": [], "user_metadata": {}, "sdk_version": "crucible-kitchen", "type": "create_session"},
        )
        self.session_id = str(opened.get("session_id"))
        if self.extended and not isinstance(opened.get("crucible"), dict):
            raise CapabilityError(
                "the training server knows the wire's profile only, without the extensions of this project's servers",
                hint="give the adapter extensions=false; --dry-run then says what such a server cannot do",
            )
        self._models = 0
        await self._create_model()

    async def _create_model(self) -> None:
        self._models += 1
        creation = {k: v for k, v in self.creation.items() if self.extended or k != "crucible"}
        body = {"session_id": self.session_id, "model_seq_id": self._models - 1, "type": "create_model", **creation}
        taken = await self.endpoint.post("create_model", body)
        answer = await self.endpoint.result(str(taken.get("request_id")))
        self.model_id = str(answer.get("model_id"))
        self._number = 0

    async def send(self, call: Call) -> Awaitable[JsonObject]:
        """Submit a call; return what its result is awaited by.

        Raises:
            SessionLost: an earlier call's fate is unknown, so that the sequence has a gap.
        """
        async with self._sending:
            if call.place is not None and call.place[1] <= self._left:
                raise _left()
            if self._poisoned is not None:
                raise SessionLost(
                    "an earlier call could not be submitted, so that its place in the sequence is unknown",
                    hint="open a new session and load its last state",
                ) from self._poisoned
            for attempt in range(_REVIVALS):
                try:
                    await self._post(call)
                    break
                except SessionLost:
                    if attempt == _REVIVALS - 1:
                        raise
                    await self._revive()
            self.kept.append(call)
            if call.path in ("save_weights", "load_weights"):
                call.before = self.kept[:-1]
        return self._result(call)

    async def _post(self, call: Call) -> None:
        head = dumps({"model_id": self.model_id, "seq_id": self._number + 1})
        data = head[:-1] + b"," + call.body[1:] if len(call.body) > 2 else head
        try:
            taken = await self.endpoint.post(call.path, data)
        except TransientBackendError as error:
            self._poisoned = error
            raise
        self._number += 1
        call.request_id = str(taken.get("request_id"))

    async def _result(self, call: Call) -> JsonObject:
        """Wait for a call's result; if the server lost it, make the model again first."""
        for _ in range(_REVIVALS):
            life = self._life
            try:
                answer = await self.endpoint.result(call.request_id)
            except SessionLost:
                await self._revive_after(life, call)
                continue
            except CrucibleError:
                self._end(call)
                raise
            self._end(call)
            return answer
        raise SessionLost("the training server lost the call again and again", hint="read the server's own log")

    def _end(self, call: Call) -> None:
        call.ended.set()
        if call.place is None:
            self.kept = [c for c in self.kept if c is not call]

    async def _revive_after(self, life: int, call: Call) -> None:
        async with self._sending:
            if call not in self.kept:
                raise _left()
            if self._life == life:
                await self._revive()

    async def reset(self) -> None:
        """Make the model again as if the calls that were dropped had never been."""
        async with self._sending:
            await self._revive()

    async def _revive(self) -> None:
        """Create the model, load its last state and send again what came after."""
        for attempt in range(_REVIVALS):
            try:
                await self.create()
                if self.start is not None:
                    await self._load(self.start)
                for call in list(self.kept):
                    await self._post(call)
                    if call.ended.is_set():
                        await self._again(call)
            except SessionLost:
                if attempt == _REVIVALS - 1:
                    raise
            else:
                break
        self._life += 1

    async def _load(self, start: Start) -> None:
        load = start.call()
        await self._post(load)
        await self.endpoint.result(load.request_id)

    async def _again(self, call: Call) -> None:
        """Wait for a call that had ended before; it fails as it did then."""
        try:
            await self.endpoint.result(call.request_id)
        except SessionLost:
            raise
        except CrucibleError:
            return

    def drop(self, place: Place) -> None:
        """Forget the calls of an accumulation that was left, and send none that are still to come."""
        self._left = max(self._left, place[1])
        self.kept = [call for call in self.kept if call.place != place]

    async def saved(self, state: StateRef, save: Call) -> None:
        """Note a state that holds all that was sent before ``save``, but what is still being accumulated."""
        before = save.before
        for call in before:
            await call.ended.wait()
        applied = {call.place for call in before if call.path == "optim_step"}
        self._forget([call for call in before if call.place in applied])
        self.start = Start(state)
        await self._delete_doomed()

    async def begun(self, start: Start, load: Call) -> None:
        """Note that the model is now as ``start`` says, whatever was sent before ``load``."""
        before = load.before
        for call in before:
            await call.ended.wait()
        self._forget(before)
        self.start = start
        await self._delete_doomed()

    def _forget(self, calls: list[Call]) -> None:
        gone = set(map(id, calls))
        self.kept = [call for call in self.kept if id(call) not in gone]

    async def delete(self, state: StateRef) -> None:
        """Delete a state; the one that the model would be made from again goes when there is another."""
        self._doomed.append(state)
        await self._delete_doomed()

    async def _delete_doomed(self) -> None:
        doomed, self._doomed = self._doomed, []
        for state in doomed:
            if self.start is not None and state.uri == self.start.state.uri:
                self._doomed.append(state)
                continue
            with suppress(NotFoundError):
                run, _, rest = state.uri.removeprefix("tinker://").partition("/")
                await self.endpoint.delete(f"training_runs/{run}/checkpoints/{rest}")

    def check_loadable(self, state: StateRef) -> None:
        """Check that a state was not deleted.

        Raises:
            NotFoundError: it was.
        """
        if any(state.uri == doomed.uri for doomed in self._doomed):
            raise NotFoundError(f"the state {state.uri!r} was deleted")

    async def close(self) -> None:
        """Free the model on the server, if it can be reached soon."""
        if self.model_id:
            with anyio.move_on_after(2.0, shield=True):
                try:
                    await self.endpoint.post("unload_model", {"model_id": self.model_id}, patience=1.0)
                except CrucibleError:
                    return


def _left() -> BackendUserError:
    return BackendUserError("the step was left before this call ended", hint="open it again with session.step()")
