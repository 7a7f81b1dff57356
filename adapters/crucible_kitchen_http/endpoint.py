"""One training server over HTTP: bounded connections, typed errors, requests sent again while that can help.

Every request of the wire may be sent twice, because the server knows it by its number. So whatever may pass (a lost
connection, a reply cut short, a server that restarts) is tried again until ``patience`` ends. Knows no training. Read
next: ``crucible_kitchen_http.remote``.
"""

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import anyio
from pydantic import SecretStr

from crucible_kitchen.connections import Connections, check_address
from crucible_kitchen.errors import (
    BackendError,
    BackendUserError,
    CapacityError,
    ConfigError,
    CrucibleError,
    SessionLost,
    TransientBackendError,
)
from crucible_kitchen.types import JsonObject
from crucible_kitchen.wire.codec import dumps, loads
from crucible_kitchen.wire.failures import failure_from_wire
from crucible_kitchen.wire.messages import PREFIX
from crucible_kitchen.workers import run_sync

if TYPE_CHECKING:
    import httpx

__all__ = ["Endpoint", "EndpointOptions", "accepted", "beat"]

R = TypeVar("R")
_log = logging.getLogger(__name__)

_FORM = "http://host:port"
_FIRST_DELAY = 0.05
_SILENT = 2.0  # seconds of failing that are not worth a word
_LARGE = 1 << 18
_BEAT = 10.0


@dataclass(frozen=True)
class EndpointOptions:
    """Where the server is and how to treat it.

    Attributes:
        base_url: without ``/api/v1``.
        api_key: sent as ``X-API-Key``; never shown.
        timeout: seconds that one exchange may take; longer than the server holds a request for a result.
        patience: seconds for which a request is sent again.
        max_concurrency: requests under way at once; more wait.

    Raises:
        ConfigError: a value is out of range, or the address holds a credential.
    """

    base_url: str
    api_key: SecretStr | None = None
    timeout: float = 60.0
    patience: float = 120.0
    max_concurrency: int = 128

    def __post_init__(self) -> None:
        check_address(self.base_url, _FORM)
        if self.timeout <= 0 or self.patience < 0 or self.max_concurrency < 1:
            raise ConfigError("timeout and max_concurrency must be positive, patience 0 or more")

    def public(self) -> JsonObject:
        """Return what may stand in a manifest."""
        return {name: getattr(self, name) for name in ("base_url", "timeout", "patience", "max_concurrency")}


@dataclass
class Endpoint:
    """A connection pool to one server, opened by its first request."""

    options: EndpointOptions
    _random: random.Random = field(default_factory=random.Random)
    _told: bool = False

    def __post_init__(self) -> None:
        options = self.options
        headers = {"X-API-Key": options.api_key.get_secret_value()} if options.api_key else {}
        self._connections = Connections(
            "the training server",
            options.base_url,
            _FORM,
            headers,
            options.timeout,
            options.max_concurrency,
            proxied=False,
        )

    async def post(self, path: str, body: JsonObject | bytes, *, patience: float | None = None) -> JsonObject:
        """Send a request until it is answered, refused, or patience ends, and return the answer.

        Raises:
            SessionLost: the server does not know what the request speaks of any more.
            BackendUserError: the server refused the request.
            CapacityError: the server is full, also after all patience.
            TransientBackendError: the server cannot be reached or is broken, also after all patience.
        """
        data = body if isinstance(body, bytes) else dumps(body)
        return await self._request(lambda: self._exchange("POST", path, data), patience)

    async def get(self, path: str) -> JsonObject:
        """Ask for something; raises as :meth:`post` does."""
        return await self._request(lambda: self._exchange("GET", path, None), None)

    async def result(self, request_id: str) -> JsonObject:
        """Wait for the result of a request, however long it takes; the server holds each question.

        Raises:
            CrucibleError: the request failed as the server tells; else as :meth:`post` does.
        """
        question = {"request_id": request_id, "allow_metadata_only": False}
        while True:
            answer = await self.post("retrieve_future", question)
            if answer.get("type") != "try_again":
                return accepted(answer)

    async def delete(self, path: str) -> JsonObject:
        """Delete something; raises as :meth:`post` does."""
        return await self._request(lambda: self._exchange("DELETE", path, None), None)

    async def download(self, path: str) -> bytes:
        """Fetch bytes; raises as :meth:`post` does."""
        return await self._request(lambda: self._fetch("GET", path, None), None)

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        await self._connections.aclose()

    async def _request(self, exchange: Callable[[], Awaitable[R]], patience: float | None) -> R:
        allowed = self.options.patience if patience is None else patience
        failing_since: float | None = None
        attempt = 0
        while True:
            try:
                answer = await exchange()
            except CrucibleError as error:
                now = anyio.current_time()
                failing_since = now if failing_since is None else failing_since
                if not error.retryable or now - failing_since >= allowed:
                    raise
                self._tell(error, now - failing_since, allowed)
            else:
                self._told = False
                return answer
            await anyio.sleep(self._random.uniform(0.5, 1.0) * min(_FIRST_DELAY * 2.0**attempt, 2.0))
            attempt += 1

    def _tell(self, error: CrucibleError, failing: float, allowed: float) -> None:
        """Say once that the server is waited for, so that nobody wonders what a run is doing."""
        if failing >= _SILENT and not self._told:
            self._told = True
            _log.warning("%s; trying again, for %g s in all", error.message, allowed)

    async def _exchange(self, method: str, path: str, data: bytes | None) -> JsonObject:
        return await _json(await self._fetch(method, path, data))

    async def _fetch(self, method: str, path: str, data: bytes | None) -> bytes:
        response = await self._connections.request(method, f"{PREFIX}{path}", data)
        if response.is_success or response.status_code == 408:
            return response.content
        raise _refusal(response)


async def beat(endpoint: Endpoint, session_id: Callable[[], str]) -> None:
    """Tell a server again and again that the client of a session lives; which session that is may change."""
    while True:
        await anyio.sleep(_BEAT)
        try:
            await endpoint.post("session_heartbeat", {"session_id": session_id()}, patience=0.0)
        except CrucibleError:
            continue  # the next call will find out what it is


def accepted(answer: JsonObject) -> JsonObject:
    """Return an answer that is a result.

    Raises:
        CrucibleError: it tells of a failure.
    """
    if "error" in answer:
        raise failure_from_wire(answer)
    return answer


async def _json(data: bytes) -> JsonObject:
    try:
        return loads(data) if len(data) < _LARGE else await run_sync(loads, data)
    except BackendUserError as error:
        raise BackendError(
            "what answers at base_url is no training server: its answer is not JSON", hint="check base_url"
        ) from error


def _refusal(response: "httpx.Response") -> BackendError | CrucibleError:
    """Return the error of a status; the body of the wire's shape says more."""
    status = response.status_code
    if status in (401, 403):
        return BackendUserError(
            f"the training server answered {status}: the key was not accepted",
            hint="set the option api_key, e.g. api_key=env:CRUCIBLE_API_KEY",
        )
    try:
        told = loads(response.content)
    except BackendUserError:
        told = {}
    if isinstance(told.get("error"), str):
        error = failure_from_wire(told)
        if status == 410 and not isinstance(error, SessionLost):
            return SessionLost(error.message, hint=error.hint)
        return error
    if status == 410:
        return SessionLost("the training server has lost the request")
    if status == 429:
        return CapacityError("the training server has no capacity at the moment")
    if status >= 500:
        return TransientBackendError(f"the training server answered {status}")
    if status == 404:
        return BackendUserError("there is no training server at base_url (it answered 404)", hint="check base_url")
    return BackendUserError(f"the training server refused the request ({status})")
