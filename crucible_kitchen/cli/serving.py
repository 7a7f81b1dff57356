"""The command ``train-server``: a training client behind the wire.

Read next: ``crucible_kitchen.service.server``.
"""

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from crucible_kitchen.cli.console import answer_json, reporting, say
from crucible_kitchen.cli.options import DEFAULT_HOME, HomeOption, JsonOption
from crucible_kitchen.errors import AdapterError

__all__ = ["train_server"]

KEY_VARIABLE = "CRUCIBLE_API_KEY"

_OBJECTS = 50_000
"""New ones after which the server looks for garbage among them."""

BackendOption = Annotated[
    str,
    typer.Option("--adapter", metavar="training_client=NAME[,KEY=VALUE...]", help="What trains behind the server."),
]


@reporting
def train_server(
    model: Annotated[str, typer.Option("--model", metavar="tiny|DIR|ID", help="The base model to serve.")] = "tiny",
    host: Annotated[str, typer.Option(help="The interface to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to serve on; 0 takes a free one.", min=0, max=65535)] = 8700,
    home: HomeOption = DEFAULT_HOME,
    adapter: BackendOption = "training_client=torch",
    as_json: JsonOption = False,
) -> None:
    """Serve a model for training over HTTP. Clients send the key that CRUCIBLE_API_KEY holds. Ctrl-C ends it."""
    import anyio

    from crucible_kitchen.cli.given import adapters
    from crucible_kitchen.registry import Registry
    from crucible_kitchen.service.run import bind, check_reach, uvicorn_server
    from crucible_kitchen.service.server import TrainingServer

    key = os.environ.get(KEY_VARIABLE) or None
    check_reach(host, key)
    registry = Registry.discover()
    ((asked, choice),) = adapters(registry, [adapter]).items()
    if asked != "training_client" or choice is None:
        raise AdapterError(f"{adapter!r} is no training client", hint="for instance --adapter training_client=torch")
    name, options = choice if isinstance(choice, tuple) else (choice, {})
    client = registry.build_adapter(asked, name, options, home.absolute())
    server = TrainingServer(client, _absolute(model), home.absolute() / "train-server", loaded=_collect_less)

    def ready() -> None:
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        if as_json:
            answer_json({"url": url, "model": model, "key": key is not None})
        say(f"serving {model} at {url}" + ("" if key else f", without a key ({KEY_VARIABLE} is not set)"))

    serving = uvicorn_server(server, key, ready=ready)
    bound = bind(host, port)
    with bound:
        anyio.run(lambda: serving.serve(sockets=[bound]))


def _collect_less() -> None:
    """Look for cyclic garbage less often, and not among what is in memory: torch's hundred thousand objects.

    A full collection of those took 0.1 s. A request makes a hundred objects, so that the usual 700 came together nine
    times in 64 samples, 0.2 to 0.6 ms each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS)


def _absolute(model: str) -> str:
    """Return a directory's absolute path, and every other name as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model
