"""One HTTP endpoint: bounded concurrency, typed errors, capped and jittered retries, a secret that stays inside.

It knows no shape of request or reply. Read next: ``crucible_kitchen_openai.chat``.
"""

import random
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import SecretStr
from pydantic_core import to_json

from crucible_kitchen.connections import Connections, check_address, secret
from crucible_kitchen.errors import (
    BackendError,
    BackendUserError,
    CapacityError,
    ConfigError,
    TransientBackendError,
)
from crucible_kitchen.types import JsonObject

if TYPE_CHECKING:
    import httpx

__all__ = ["Endpoint", "EndpointOptions"]

_FORM = "https://host/v1"
_FIRST_DELAY = 0.5
_WORD = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class EndpointOptions:
    """Where the service is and how to treat it.

    Attributes:
        base_url: up to and including the version, for instance ``https://host/v1``.
        api_key: sent as a bearer token; never shown.
        timeout: seconds that one attempt may take.
        max_concurrency: requests under way at once; more wait.
        retries: attempts after the first, for errors that may pass.
        max_delay: longest wait between two attempts, seconds; also caps what the service asks for.

    Raises:
        ConfigError: a value is out of range, or the address holds a credential.
    """

    base_url: str
    api_key: SecretStr | None = None
    timeout: float = 120.0
    max_concurrency: int = 16
    retries: int = 4
    max_delay: float = 30.0

    def __post_init__(self) -> None:
        check_address(self.base_url, _FORM)
        if self.timeout <= 0 or self.max_concurrency < 1 or self.retries < 0 or self.max_delay < 0:
            raise ConfigError("timeout and max_concurrency must be positive, retries and max_delay 0 or more")

    @classmethod
    def of(
        cls,
        base_url: str,
        api_key: SecretStr | str | None,
        timeout: float | str,
        max_concurrency: int | str,
        retries: int | str,
        max_delay: float | str,
    ) -> "EndpointOptions":
        """Build options from what a command line may give: texts for numbers, a text for the key."""
        numbers = float(timeout), int(max_concurrency), int(retries), float(max_delay)
        return cls(base_url.rstrip("/"), secret(api_key), *numbers)

    def public(self) -> JsonObject:
        """Return what may stand in a manifest."""
        names = ("base_url", "timeout", "max_concurrency", "retries", "max_delay")
        return {name: getattr(self, name) for name in names}


@dataclass
class Endpoint:
    """A connection pool to one service, opened by its first request."""

    options: EndpointOptions
    _random: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        options = self.options
        headers = {"Authorization": f"Bearer {options.api_key.get_secret_value()}"} if options.api_key else {}
        self._connections = Connections(
            "the service", options.base_url, _FORM, headers, options.timeout, options.max_concurrency, proxied=True
        )

    async def post(self, path: str, body: JsonObject) -> JsonObject:
        """Send a request until it is answered, refused, or out of attempts, and return the answer.

        Raises:
            BackendUserError: the service refused the request.
            CapacityError: the service is full, also after all retries.
            TransientBackendError: the service cannot be reached or is broken, also after all retries.
        """
        return await self._request("POST", path, body)

    async def get(self, path: str) -> JsonObject:
        """Ask for something; raises as :meth:`post` does."""
        return await self._request("GET", path, None)

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        await self._connections.aclose()

    async def _request(self, method: str, path: str, body: JsonObject | None) -> JsonObject:
        attempt = 0
        while True:
            asked = None
            try:
                response = await self._connections.request(method, path, None if body is None else to_json(body))
                if response.is_success:
                    return _json(response)
                failure, asked = _refusal(response), _retry_after(response)
            except TransientBackendError as error:
                failure = error
            if not failure.retryable or attempt == self.options.retries:
                raise failure
            await anyio.sleep(self._delay(attempt, asked))
            attempt += 1

    def _delay(self, attempt: int, asked: float | None) -> float:
        """Return the seconds to wait: what the service asked for, else exponential with jitter; capped."""
        if asked is not None:
            return min(asked, self.options.max_delay)
        return self._random.uniform(0.5, 1.0) * min(_FIRST_DELAY * 2.0**attempt, self.options.max_delay)


def _json(response: "httpx.Response") -> JsonObject:
    try:
        value = response.json()
    except ValueError as error:
        raise BackendError("the service answered with something that is not JSON", hint="check base_url") from error
    if not isinstance(value, dict):
        raise BackendError("the service answered with JSON of another shape", hint="check base_url")
    return value


def _refusal(response: "httpx.Response") -> BackendError:
    """Return the error of a status. The service's own text may quote the request, so only its code is told."""
    status, code = response.status_code, _code(response)
    what = f"the service answered {status}" + (f" ({code})" if code else "")
    if status == 429:
        return CapacityError(f"{what}: too many requests", hint="lower max_concurrency, or wait")
    if status in (401, 403):
        return BackendUserError(f"{what}: the key was not accepted", hint="set the option api_key, e.g. env:NAME")
    if status == 404:
        return BackendUserError(f"{what}: no such model or address", hint="check the options model and base_url")
    if status == 408 or status >= 500:
        return TransientBackendError(what, hint="the service's own log says more")
    return BackendUserError(f"{what}: the request was refused", hint="check the options and the length of the request")


def _code(response: "httpx.Response") -> str:
    """Return the service's short error code, if it is a word."""
    try:
        error: Any = response.json()["error"]
        code = error.get("code") or error.get("type") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return code if isinstance(code, str) and _WORD.fullmatch(code) else ""


def _retry_after(response: "httpx.Response") -> float | None:
    """Return the seconds that the service asks to wait, given as a number or as a date."""
    text = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
