"""Serving over HTTP: uvicorn around the application, and what it says when it is ready.

Read next: ``crucible_kitchen.service.app``.
"""

import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from crucible_kitchen.errors import ConfigError, MissingExtra
from crucible_kitchen.service.server import TrainingServer

if TYPE_CHECKING:
    import uvicorn

__all__ = ["bind", "check_reach", "uvicorn_server"]


def check_reach(host: str, api_key: str | None) -> None:
    """Refuse to serve beyond this machine without a key.

    Raises:
        ConfigError: that is what was asked for.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not api_key:
        raise ConfigError(
            f"{host} is reached from other machines, and there is no key",
            hint="set CRUCIBLE_API_KEY, or serve 127.0.0.1",
        )


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, connections are without delay (Nagle's): 40 ms for every exchange otherwise.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot serve on {host}:{port}: {error.strerror}", hint="choose another --port") from error
    return bound


def uvicorn_server(
    server: TrainingServer, api_key: str | None, *, ready: Callable[[], None] = lambda: None
) -> "uvicorn.Server":
    """Return a server ready to ``serve(sockets=[...])``; it ends on SIGINT and SIGTERM.

    Args:
        server: what answers.
        api_key: what clients must send; None asks for nothing.
        ready: called once requests are taken.

    Raises:
        MissingExtra: the extra ``service`` is not installed.
    """
    try:
        import uvicorn

        from crucible_kitchen.service.app import training_app
    except ImportError as error:
        raise MissingExtra("uvicorn", "service") from error

    class Serving(uvicorn.Server):
        async def startup(self, sockets: "list[socket.socket] | None" = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        async def shutdown(self, sockets: "list[socket.socket] | None" = None) -> None:
            server.end()  # whoever waits for a result is answered, so that no connection holds up the end
            await super().shutdown(sockets)

    config = uvicorn.Config(
        training_app(server, api_key),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,
        backlog=2048,
    )
    return Serving(config)
