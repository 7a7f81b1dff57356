"""A training server on the loopback interface, in a thread of its own, for tests and benchmarks.

Extra ``[service]``. Read next: ``crucible_kitchen.service.server``.
"""

import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Self

import anyio

from crucible_kitchen.service.models import Limits
from crucible_kitchen.service.run import bind, uvicorn_server
from crucible_kitchen.service.server import TrainingServer

__all__ = ["RunningServer"]


class RunningServer:
    """Serves inside ``with``.

    Args:
        model: the base model.
        home: the state directory.
        api_key: what clients must send; None asks for nothing.
        limits: what is allowed.
        adapter: the training client behind the server.
        options: of the adapter.

    Attributes:
        core: the server without HTTP.
        url: where it is.
    """

    def __init__(
        self,
        model: str,
        home: Path,
        api_key: str | None = None,
        *,
        limits: Limits | None = None,
        adapter: str = "torch",
        **options: Any,
    ) -> None:
        (entry,) = entry_points(group="crucible_kitchen.adapters", name=f"training_client.{adapter}")
        self.core = TrainingServer(entry.load()(**options), model, home, limits)
        self._ready = threading.Event()
        self._serving = uvicorn_server(self.core, api_key, ready=self._ready.set)
        self._socket = bind("127.0.0.1", 0)
        self._thread = threading.Thread(target=self._run, name="training-server")
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _run(self) -> None:
        anyio.run(lambda: self._serving.serve(sockets=[self._socket]))

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(60):
            raise RuntimeError("the server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.should_exit = True
        self._thread.join()
        self._socket.close()
