"""The training server as an ASGI application: paths, the key, sizes, and errors as the wire has them.

Read next: ``crucible_kitchen.service.server``.
"""

import hmac
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from crucible_kitchen.errors import (
    BackendUserError,
    CapacityError,
    Conflict,
    CrucibleError,
    NotFoundError,
    SessionLost,
)
from crucible_kitchen.service.futures import Future
from crucible_kitchen.service.server import TrainingServer
from crucible_kitchen.types import JsonObject
from crucible_kitchen.wire.codec import dumps, loads, parse
from crucible_kitchen.wire.failures import failure_to_wire
from crucible_kitchen.wire.messages import PREFIX, RetrieveFuture, Sample
from crucible_kitchen.workers import run_sync

__all__ = ["training_app"]

Handler = Callable[[Request], Awaitable[Response]]

_SUBMITTED = (
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
    "export_model",
)
_LARGE = 1 << 18
"""Bodies above it are read in a worker thread."""


def training_app(server: TrainingServer, api_key: str | None) -> Starlette:
    """Return the application of a server.

    Args:
        server: what answers; it is opened with the application.
        api_key: what clients must send as ``X-API-Key``; None asks for none.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        async with server.open():
            yield

    http = _Http(server, api_key)
    post = {
        "client/config": _constant({}),
        "client/dynamic_config": _constant({}),
        "telemetry": _constant({"status": "accepted"}),
        "create_session": http.now(server.create_session),
        "session_heartbeat": http.now(server.heartbeat),
        "sessions/{session_id}/finish": http.finish,
        "create_model": http.future(server.create_model),
        "get_info": http.soon(server.get_info),
        "weights_info": http.soon(server.weights_info),
        "unload_model": http.now(server.unload),
        "create_sampling_session": http.soon(server.create_sampling_session),
        "close_sampling_session": http.soon(server.close_sampling),
        "asample": http.sample,
        "asample_batch": http.soon(server.sample_batch),
        "cancel_future": http.now(server.cancel),
        "retrieve_future": http.retrieve,
    }
    for kind in _SUBMITTED:
        post[kind] = http.submit(kind)
    get = {
        "get_server_capabilities": http.capabilities,
        "models/{model_id}/tokenizer": http.tokenizer,
        "samplers/{sampling_session_id}": http.sampler,
        "samplers/{sampling_session_id}/tokenizer": http.sampler_tokenizer,
        "exports/{archive}": http.archive,
    }
    delete = {"training_runs/{run}/checkpoints/{kind}/{name}": http.delete}
    tables: Sequence[tuple[str, Mapping[str, Handler]]] = (("POST", post), ("GET", get), ("DELETE", delete))
    routes = [
        Route(PREFIX + path, http.guarded(call), methods=[method])
        for method, table in tables
        for path, call in table.items()
    ]
    routes.append(Route(f"{PREFIX}healthz", _constant({"status": "ok"})))
    return Starlette(routes=routes, lifespan=lifespan)


def _answer(body: JsonObject | bytes, status: int = 200) -> Response:
    content = body if isinstance(body, bytes) else dumps(body)
    return Response(content, status_code=status, media_type="application/json")


def _refusal(error: Exception) -> Response:
    """Return an error that ends a request at once."""
    return _answer(failure_to_wire(error), _status(error))


def _status(error: Exception) -> int:
    statuses: tuple[tuple[type[Exception], int], ...] = (
        (_TooLarge, 413),
        (SessionLost, 410),
        (NotFoundError, 404),
        (CapacityError, 429),
        (Conflict, 409),
    )
    for kind, status in statuses:
        if isinstance(error, kind):
            return status
    return 400 if isinstance(error, CrucibleError) else 500


class _TooLarge(BackendUserError):
    """Raised when a request's body is over the limit."""


def _constant(body: JsonObject) -> Handler:
    async def handle(_: Request) -> Response:
        return _answer(body)

    return handle


class _Http:
    """The handlers: from requests to the server's calls and back."""

    def __init__(self, server: TrainingServer, api_key: str | None) -> None:
        self._server = server
        self._key = api_key.encode() if api_key else None

    def guarded(self, handler: Handler) -> Handler:
        """Ask for the key, and give errors their shape."""

        async def handle(request: Request) -> Response:
            if not self._admits(request):
                return _answer({"error": "the key was not accepted", "category": "user", "error_class": "key"}, 401)
            try:
                return await handler(request)
            except ClientDisconnect:
                return _answer({}, 400)
            except Exception as error:  # noqa: BLE001 - the shape of all errors
                return _refusal(error)

        return handle

    def _admits(self, request: Request) -> bool:
        if self._key is None:
            return True
        given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self._key)

    async def _body(self, request: Request) -> JsonObject:
        limit = self._server.limits.body
        if int(request.headers.get("content-length") or 0) > limit:
            raise _TooLarge(f"the request is larger than {limit} bytes", hint="send the batch in parts")
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > limit:
                raise _TooLarge(f"the request is larger than {limit} bytes", hint="send the batch in parts")
        raw = bytes(data)
        return loads(raw) if len(raw) < _LARGE else await run_sync(loads, raw)

    def now(self, call: Callable[[JsonObject], JsonObject]) -> Handler:
        """Answer with what a call returns."""

        async def handle(request: Request) -> Response:
            return _answer(call(await self._body(request)))

        return handle

    def soon(self, call: Callable[[JsonObject], Awaitable[JsonObject | bytes]]) -> Handler:
        """Answer with what a coroutine returns."""

        async def handle(request: Request) -> Response:
            return _answer(await call(await self._body(request)))

        return handle

    def future(self, call: Callable[[JsonObject], Future]) -> Handler:
        """Answer with the id of a result to come."""

        async def handle(request: Request) -> Response:
            return _answer(call(await self._body(request)).taken)

        return handle

    def submit(self, kind: str) -> Handler:
        """Take a call on a model."""

        async def handle(request: Request) -> Response:
            body = await self._body(request)
            taken = self._server.submit(kind, body).taken
            return _answer(taken | {"model_id": body.get("model_id")})

        return handle

    async def finish(self, request: Request) -> Response:
        """Close a client's session."""
        return _answer(self._server.finish(request.path_params["session_id"]))

    async def sample(self, request: Request) -> Response:
        """Take a request to sample."""
        body = await self._body(request)
        message = parse(Sample, body)
        future = self._server.sample(body)
        return _answer(future.taken | {"sample_sequence_ids": [f"{future.id}-{i}" for i in range(message.num_samples)]})

    async def retrieve(self, request: Request) -> Response:
        """Hold the request until the result is there, or for as long as clients wait."""
        message = parse(RetrieveFuture, await self._body(request))
        found = await self._server.futures.wait(message.request_id, self._server.limits.hold)
        if found is None:
            again: Any = {"type": "try_again", "request_id": message.request_id, "queue_state": "active"}
            return _answer(again, 408)
        return _answer(found)

    async def capabilities(self, _: Request) -> Response:
        """Say which model is served."""
        return _answer(
            {"supported_models": [{"model_name": self._server.model, "trainable": True, "sampleable": True}]}
        )

    async def tokenizer(self, request: Request) -> Response:
        """Give the files of a model's tokenizer."""
        return _answer(await self._server.tokenizer(request.path_params["model_id"]))

    async def sampler_tokenizer(self, request: Request) -> Response:
        """Give the files of the tokenizer of a sampling session."""
        return _answer(await self._server.sampler_tokenizer(request.path_params["sampling_session_id"]))

    async def archive(self, request: Request) -> Response:
        """Give an archive that was exported."""
        return FileResponse(await run_sync(self._server.exports.find, request.path_params["archive"]))

    async def delete(self, request: Request) -> Response:
        """Delete saved weights."""
        place = request.path_params
        path = f"tinker://{place['run']}/{place['kind']}/{place['name']}"
        await run_sync(self._server.index.delete, path)
        return _answer({})

    async def sampler(self, request: Request) -> Response:
        """Say what a sampling session samples from."""
        session = self._server.sampling_session(request.path_params["sampling_session_id"])
        told = {"sampler_id": session.id, "base_model": session.base_model}
        return _answer(told | ({"model_path": session.model_path} if session.model_path else {}))
