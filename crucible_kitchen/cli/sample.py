"""The command ``sample``: talk with any model, registered, trained, local or from a hub.

Finds what a name means and writes replies as they grow; the model is the training client's. Read next:
``crucible_kitchen.ports.sampling_client``.
"""

import json
import re
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crucible_kitchen.cli.console import answer_json, reporting, say
from crucible_kitchen.cli.options import DEFAULT_HOME, AdapterOption, HomeOption, JsonOption
from crucible_kitchen.cli.states import SavedModel, saved_model
from crucible_kitchen.errors import AdapterError, ConfigError, ModelNotFound, NotFoundError, VersionNotFound

if TYPE_CHECKING:
    from crucible_kitchen.ports import Sampler
    from crucible_kitchen.types import Message, SamplingParams

__all__ = ["sample"]

_VERSION = re.compile(r"[^/\\:]+:[^/\\:]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal would obey."""

_USED = {"training_client": "torch", "model_registry": "sqlite", "blob_store": "files"}


@reporting
def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN|VERSION",
            help="`tiny`, a directory, a .gguf file, a hub id, a run's id, `RUN@STEP` for a checkpoint, or "
            "NAME:VERSION with a number or an alias.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Answer this and end. Without it: a chat in a terminal, else standard input is the prompt.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens with this probability.")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest reply, tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the replies; the same seed gives the same ones.")] = 0,
    home: HomeOption = DEFAULT_HOME,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with a model. Ctrl-C ends a reply, Ctrl-D the chat."""
    import anyio

    from crucible_kitchen.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", hint="give one with --prompt TEXT or on standard input")
    if prompt is None and as_json:
        raise ConfigError("--json needs one prompt", hint="give it with --prompt TEXT")
    first = [_message("system", system)] if system else []
    anyio.run(_talk, model, home.absolute(), tuple(adapter or ()), first, prompt, params, as_json)


async def _talk(
    model: str,
    home: Path,
    given: tuple[str, ...],
    first: "list[Message]",
    prompt: str | None,
    params: "SamplingParams",
    as_json: bool,
) -> None:
    async with _opened(model, home, given) as sampler:
        if prompt is None:
            await _chat(_Speaker(sampler, params), first)
            return
        speaker = _Speaker(sampler, params)
        messages = [*first, _message("user", prompt)]
        if as_json:
            await _told(speaker, messages)
        else:
            await speaker.reply(messages)


def _message(role: str, content: str) -> "Message":
    from crucible_kitchen.types import Message

    return Message(role, content)


async def _told(speaker: "_Speaker", messages: "list[Message]") -> None:
    (found,) = await speaker.sampler.sample(speaker.ids(messages), speaker.params)
    mean = float(found.logprobs.mean()) if len(found.logprobs) else 0.0
    answer_json(
        {
            "text": found.text,
            "stop_reason": found.stop_reason,
            "tokens": len(found.tokens),
            "mean_logprob": mean,
            "version": found.version,
        }
    )


async def _chat(speaker: "_Speaker", messages: "list[Message]") -> None:
    """Read lines and answer them until the input ends."""
    say("Ctrl-C ends a reply, Ctrl-D the chat.")
    while True:
        line = _line()  # on the loop's own thread, which has nothing else to do: an interrupt must reach it
        if line is None:
            say()
            return
        if line.strip():
            messages = [*messages, _message("user", line)]
            messages.append(_message("assistant", await speaker.reply(messages)))


def _line() -> str | None:
    """Return a line from the terminal, empty if it was interrupted; None at the end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input("> ")
    except EOFError:
        return None
    except KeyboardInterrupt:
        say()
        return ""
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Speaker:
    """A sampler whose replies appear while they grow."""

    sampler: "Sampler"
    params: "SamplingParams"

    def ids(self, messages: "list[Message]") -> list[int]:
        """Return a conversation as the model takes it; for a model without a chat template just its text."""
        tokenizer = self.sampler.tokenizer
        if tokenizer.chat:
            return tokenizer.render_chat(messages, generation_prompt=True)
        return [*tokenizer.prefix_ids, *tokenizer.encode("\n".join(m.content for m in messages))]

    async def reply(self, messages: "list[Message]") -> str:
        """Write the reply to a conversation, and return it; an interrupt ends it early."""
        import anyio

        text = ""
        with anyio.open_signal_receiver(signal.SIGINT) as interrupts:
            async with anyio.create_task_group() as group:

                async def stop() -> None:
                    async for _ in interrupts:
                        group.cancel_scope.cancel()

                group.start_soon(stop)
                async for part in self._parts(self.ids(messages)):
                    text += part
                    typer.echo(_CONTROL.sub("\ufffd", part), nl=False)
                    sys.stdout.flush()
                group.cancel_scope.cancel()
        typer.echo()
        return text

    async def _parts(self, ids: list[int]) -> AsyncGenerator[str, None]:
        """Yield the reply in parts, or whole where the backend cannot stream."""
        stream = getattr(self.sampler, "stream", None)
        if stream is None:
            yield (await self.sampler.sample(ids, self.params))[0].text
            return
        async for part in stream(ids, self.params):
            yield part


class _Kitchenware:
    """The adapters that a name may need, built when it does.

    Args:
        home: where runs, models and weights are.
        given: adapters as on the command line.
    """

    def __init__(self, home: Path, given: tuple[str, ...]) -> None:
        from crucible_kitchen.cli.given import adapters
        from crucible_kitchen.registry import Registry

        self._known = Registry.discover()
        self._home = home
        self._chosen = _USED | adapters(self._known, given)
        unused = [port for port in self._chosen if port not in _USED]
        if unused:
            raise AdapterError(f"sample needs no {unused[0]}", hint=f"ports: {', '.join(_USED)}")

    @asynccontextmanager
    async def adapter(self, port: str) -> AsyncGenerator[Any, None]:
        """Build the adapter of a port and close it at the end."""
        choice = self._chosen[port]
        if choice is None:
            raise AdapterError(f"there is no {port}", hint=f"give one with --adapter {port}=NAME")
        name, options = choice if isinstance(choice, tuple) else (choice, {})
        built = self._known.build_adapter(port, name, options, self._home)
        try:
            yield built
        finally:
            await built.aclose()


@asynccontextmanager
async def _opened(model: str, home: Path, given: tuple[str, ...]) -> "AsyncGenerator[Sampler, None]":
    """Open a sampler of whatever a name means."""
    from crucible_kitchen.types import SessionSpec

    ware = _Kitchenware(home, given)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crucible-sample-")))
        saved = await saved_model(model, home, directory)
        if saved is None:
            place = _local(model, home) or await _fetched(model, ware, directory / "model")
            saved = SavedModel(SessionSpec(place, None, 0, str(directory)), None)
        client = await stack.enter_async_context(ware.adapter("training_client"))
        session = await stack.enter_async_context(client.open_session(saved.spec))
        if saved.state is not None:
            await session.load_state(saved.state)
        sampler = await session.sampler()
        stack.push_async_callback(sampler.aclose)
        yield sampler


def _local(model: str, home: Path) -> str | None:
    """Return what a training client opens: a path for a run, the name as it is for the rest; None for a version."""
    if model == "tiny" or Path(model).expanduser().exists():
        return model
    run = home / "runs" / model
    if "/" not in model and run.is_dir():
        return str(_exported(model, run / "export"))
    if not _VERSION.fullmatch(model):
        return model
    if not home.exists():  # the registry would make one by being asked
        raise VersionNotFound(f"there is no model {model!r}", hint="list them with `crucible-kitchen models`")
    return None


def _exported(run: str, export: Path) -> Path:
    if not export.is_dir() or not any(export.iterdir()):
        raise ModelNotFound(
            f"the run {run} has exported no weights",
            hint=f"does it end with save_final? `crucible-kitchen show {run}` shows how it went",
        )
    _check_base(run, export)
    return export


async def _fetched(model: str, ware: _Kitchenware, directory: Path) -> str:
    """Write a registered version's weights into a directory that does not exist yet, and return it."""
    name, _, version = model.partition(":")
    async with ware.adapter("model_registry") as registry, ware.adapter("blob_store") as blobs:
        found = await registry.get(name, int(version) if version.isdigit() else version)
        await blobs.get_tree(found.uri, directory)
    _check_base(model, directory)
    return str(directory)


def _check_base(model: str, directory: Path) -> None:
    """See that a model that consists of adapters can find what it adapts.

    Raises:
        NotFoundError: its base model is a path where nothing is.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    base = str(config.get("base_model_name_or_path") or "")
    if not base or (base.startswith(("/", ".", "~")) and not Path(base).expanduser().exists()):
        raise NotFoundError(
            f"{model} adapts the base model {base!r}, which is not there",
            hint="put the base model where it was when the adapters were trained",
        )
