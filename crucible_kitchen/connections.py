"""Connections to one HTTP service: bounded, opened by the first request, with errors of our own tree.

What an answer means and whether a request is worth sending again is for others to say. Knows no shape of request or
reply. Read next: ``crucible_kitchen.errors``.
"""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from pydantic import SecretStr

from crucible_kitchen.errors import BackendUserError, ConfigError, SessionLost, TransientBackendError
from crucible_kitchen.redaction import remember_secret

if TYPE_CHECKING:
    import httpx

__all__ = ["Connections", "check_address", "secret"]


def check_address(base_url: str, form: str) -> None:
    """Check the address of a service; ``form`` says what one looks like.

    Raises:
        ConfigError: it is none, or it holds a credential.
    """
    if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", base_url):
        raise ConfigError("base_url is not a plain http address", hint=f"write {form}; a key goes into api_key")


def secret(api_key: SecretStr | str | None) -> SecretStr | None:
    """Return a key that is shown nowhere; None for none, or an empty one."""
    key = SecretStr(api_key) if isinstance(api_key, str) else api_key
    remember_secret(key)
    return key or None


@dataclass
class Connections:
    """The connections to one service.

    Attributes:
        service: what it is called in messages.
        base_url: what every path is appended to.
        form: what an address of such a service looks like.
        headers: of every request, the key among them; never shown.
        timeout: seconds that one exchange may take.
        most: requests under way at once; more wait.
        proxied: whether the environment's proxies are used.
    """

    service: str
    base_url: str
    form: str
    headers: Mapping[str, str] = field(repr=False)
    timeout: float
    most: int
    proxied: bool
    _client: "httpx.AsyncClient | None" = field(default=None, repr=False)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._slots = anyio.Semaphore(self.most)

    async def request(self, method: str, path: str, data: bytes | None) -> "httpx.Response":
        """Send one request, with JSON or without a body, and return the answer, whatever it is.

        Raises:
            BackendUserError: there can be no service at the address.
            SessionLost: the connections are closed.
            TransientBackendError: the service cannot be reached, or does not answer in time.
        """
        headers = {"Content-Type": "application/json"} if data is not None else None
        async with self._slots:
            with self._translated(), anyio.fail_after(self.timeout):
                return await self._opened().request(method, f"{self.base_url}{path}", content=data, headers=headers)

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        self._closed = True
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _opened(self) -> "httpx.AsyncClient":
        import httpx

        if self._closed:
            raise SessionLost("the client is closed")
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.most)
            self._client = httpx.AsyncClient(
                headers=self.headers, timeout=self.timeout, limits=limits, trust_env=self.proxied
            )
        return self._client

    @contextmanager
    def _translated(self) -> Generator[None, None, None]:
        """Turn httpx's errors into ours; their messages may hold anything, so only their kind is told."""
        import httpx

        place = f"{self.service} at {self.base_url}"
        try:
            yield
        except (TimeoutError, httpx.TimeoutException) as error:
            raise TransientBackendError(f"{place} did not answer in time", hint="raise timeout=") from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise BackendUserError("base_url cannot be used", hint=f"write {self.form}") from error
        except httpx.HTTPError as error:
            raise TransientBackendError(
                f"{place} cannot be reached ({type(error).__name__})",
                hint="is it running, and base_url right?",
            ) from error
