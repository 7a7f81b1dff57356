"""A training server on the loopback interface, in a thread of its own, over the torch executor."""

import threading
from importlib.metadata import entry_points

import anyio
import pytest

from crucible_kitchen.service.run import bind, uvicorn_server
from crucible_kitchen.service.server import TrainingServer


class RunningServer:
    """A server that runs; ``stop`` ends it."""

    def __init__(self, model, home, api_key=None, limits=None, adapter="training_client.torch", **options):
        (entry,) = entry_points(group="crucible_kitchen.adapters", name=adapter)
        self.home = home
        self.core = TrainingServer(entry.load()(**options), model, home, limits)
        ready = threading.Event()
        self.serving = uvicorn_server(self.core, api_key, ready=ready.set)
        self.socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=lambda: anyio.run(lambda: self.serving.serve(sockets=[self.socket])))
        self.thread.start()
        assert ready.wait(60)

    def stop(self):
        self.serving.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory):
    server = RunningServer("tiny", tmp_path_factory.mktemp("server"), "a-key", threads=1)
    yield server
    server.stop()
