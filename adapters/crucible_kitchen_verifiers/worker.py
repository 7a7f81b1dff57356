"""Episodes of one group, played by the package ``verifiers`` in this process until the policy is to speak.

The package plays an episode against an OpenAI-compatible server. Here the server is ours: a request for a completion
suspends the episode and is given to whoever called ``begin`` or ``answer``; the next ``answer`` is the completion. The
functions run in a worker process and speak JSON. Read next: ``harness.py``; ``hermes.py``.
"""

import asyncio
import hashlib
import json
import math
import os
import random
import secrets
import sys
from collections.abc import Coroutine
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import verifiers.v1 as vf
from aiohttp import web
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.runtimes import subprocess as local

from crucible_kitchen_verifiers.hermes import described, spoken

__all__ = ["answer", "begin", "close", "describe", "open_group"]

T = TypeVar("T")
_KEY = "CRUCIBLE_KITCHEN_VERIFIERS_API_KEY"  # the package keeps variables of such names from the programs it starts
_FOLDER = "CRUCIBLE_KITCHEN_VERIFIERS_FOLDER"
_MEMBER = "X-Crucible-Member"
_HARNESS = "crucible_kitchen_verifiers"
_PARTS = 20

Json = dict[str, Any]


def _environment(name: str, settings: Json) -> "vf.Env[Any]":
    """Return the environment with this package's harness in its one seat."""
    taskset = {"id": name, **settings}
    seats = list(agent_config_fields(vf.resolve_env_config({"taskset": taskset})))
    if len(seats) != 1:
        raise ValueError(f"it seats {len(seats)} agents ({', '.join(seats)}), and one policy is rolled out here")
    if vf.default_harness_id(name) == name:
        raise ValueError("it brings a harness of its own, and only conversations are rolled out here")
    seat = {"harness": {"id": _HARNESS}, "runtime": {"type": "subprocess"}}
    return vf.load_environment(vf.resolve_env_config({"taskset": taskset, seats[0]: seat}))


def describe(name: str, settings: Json, most: int) -> Json:
    """Return which of the first tasks are trained on and which are held out, and a hash of them all."""
    hashes = [task.hash for task in islice(_environment(name, settings).taskset, most)]
    parts = [int(text[:16], 16) % _PARTS for text in hashes]
    return {
        "train": [i for i, part in enumerate(parts) if part],
        "held_out": [i for i, part in enumerate(parts) if not part],
        "fingerprint": hashlib.sha256("".join(hashes).encode()).hexdigest(),
    }


class _Episode:
    """One member: the package's task that plays it, and what passes between it and the policy."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Json] = asyncio.Queue()
        self.playing: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[tuple[str, bool]] | None = None
        self._said: list[Json] = []
        self._calls = 0

    async def play(self, environment: "vf.Env[Any]", task: "vf.Task[Any, Any, Any]", context: vf.ModelContext) -> None:
        """Have the package play a task; its end is an event, too."""
        self.events.put_nowait(_ended(await environment.run_episode(task, context)))

    async def complete(self, body: Json) -> Json:
        """Ask the policy for a completion of a conversation that only grows."""
        messages = body["messages"]
        if self._answer is not None and not self._answer.done():
            return self._refuse("asked twice at a time")
        if [_plain(m) for m in messages[: len(self._said)]] != [_plain(m) for m in self._said]:
            return self._refuse("changed what had been said")
        told = [_plain(message) for message in messages[len(self._said) :]]
        if body.get("tools") and not self._said:
            told.insert(0, ["system", described(body["tools"])])
        self._answer = asyncio.get_running_loop().create_future()
        self.events.put_nowait({"told": told})
        text, complete = await self._answer
        message = spoken(text, self._calls) if body.get("tools") else {"role": "assistant", "content": text}
        self._calls += len(message.get("tool_calls", ()))
        self._said = [*messages, message]
        finish = "tool_calls" if message.get("tool_calls") else "stop" if complete else "length"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return {"id": "0", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}

    def say(self, text: str, complete: bool) -> None:
        """Answer the request that is open."""
        assert self._answer is not None, "nothing was asked"
        self._answer.set_result((text, complete))

    def _refuse(self, why: str) -> Json:
        self.events.put_nowait({"fault": why})
        raise web.HTTPBadRequest(text=why)


def _plain(message: Json) -> list[str]:
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise web.HTTPBadRequest(text="only text can be read")
        content = "".join(part["text"] for part in content)
    return [message["role"], content]


def _ended(episode: "vf.Episode[Any, Any, Any]") -> Json:
    """Return what became of an episode; texts of its errors may quote data and stay here."""
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        return {"fault": errors[-1].type if errors else "no error"}
    if len(episode.traces) != 1:
        return {"fault": f"{len(episode.traces)} conversations instead of one"}
    (trace,) = episode.traces
    found = {**trace.metrics, **{name: reward.score for name, reward in trace.rewards.items() if reward is not None}}
    metrics = {name: float(v) for name, v in found.items() if v is not None and math.isfinite(v)}
    return {"reward": trace.reward, "truncated": trace.is_truncated or trace.is_timeout, "metrics": metrics}


class _Stage:
    """An environment that is being served, and the group that plays in it."""

    def __init__(self, environment: "vf.Env[Any]") -> None:
        self.environment = environment
        self.episodes: list[_Episode] = []
        self.tasks: list[Any] = []
        self.base_url = ""
        self._task: Any = None
        self._closing = asyncio.Event()
        self._ready = asyncio.Event()

    async def serve(self) -> None:
        """Serve what the environment shares and the policy's address, until it is closed."""
        os.environ[_KEY] = secrets.token_hex()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            async with self.environment.serving():
                self._ready.set()
                await self._closing.wait()
        finally:
            await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {os.environ[_KEY]}":
            raise web.HTTPUnauthorized
        return web.json_response(await self.episodes[int(request.headers[_MEMBER])].complete(await request.json()))

    async def until_ready(self, serving: "asyncio.Task[None]") -> None:
        """Wait until it serves; what kept it from doing so is raised."""
        ready = asyncio.get_running_loop().create_task(self._ready.wait())
        await asyncio.wait([ready, serving], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            ready.cancel()
            serving.result()

    async def open(self, index: int, size: int) -> None:
        """Take a task for a group of so many members."""
        await self.close_group()
        self._task = next(islice(self.environment.taskset, index, None))
        self.episodes = [_Episode() for _ in range(size)]

    async def begin(self, member: int) -> Json:
        """Play one member until it is the policy's turn, or over."""
        episode = self.episodes[member]
        client = vf.EvalClientConfig(base_url=self.base_url, api_key_var=_KEY, headers={_MEMBER: str(member)})
        context = vf.ModelContext(model="policy", client=client)
        playing = episode.play(self.environment, self._task, context)
        episode.playing = asyncio.get_running_loop().create_task(playing)
        return await self._next(episode)

    async def answer(self, member: int, text: str, complete: bool) -> Json:
        """Go on with what the policy said, until it is its turn again, or over."""
        self.episodes[member].say(text, complete)
        return await self._next(self.episodes[member])

    async def _next(self, episode: _Episode) -> Json:
        assert episode.playing is not None
        event = asyncio.get_running_loop().create_task(episode.events.get())
        await asyncio.wait([event, episode.playing], return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            episode.playing.result()  # what the package did not catch
        return await event

    async def close_group(self) -> None:
        """End the episodes that are not over."""
        playing = [e.playing for e in self.episodes if e.playing is not None]
        self.episodes = []
        for task in playing:
            task.cancel()
        if playing:
            await asyncio.wait(playing)


_loop = asyncio.new_event_loop()
_stages: dict[str, tuple[_Stage, "asyncio.Task[None]"]] = {}


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Let everything here go on until one thing is done; between calls it all stands still."""
    return _loop.run_until_complete(work)


def _stage() -> _Stage:
    (stage, _), *_ = _stages.values()
    return stage


def open_group(name: str, settings: Json, index: int, size: int, seed: int) -> None:
    """Open task ``index`` for ``size`` members. The environment is made once and kept."""
    key = json.dumps([name, settings])
    if key not in _stages:
        local.CACHE_DIR = Path(os.environ[_FOLDER])  # the package's own is below the home, where a kill would leave it
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # a tool's process finds the modules that this one finds
        stage = _Stage(_environment(name, settings))
        serving = _loop.create_task(stage.serve())
        _run(stage.until_ready(serving))
        _stages[key] = stage, serving
    random.seed(seed)
    _run(_stage().open(index, size))


def begin(member: int) -> Json:
    """Begin a member's episode; see ``answer``."""
    return _run(_stage().begin(member))


def answer(member: int, text: str, complete: bool) -> Json:
    """Say what the policy said.

    Returns:
        ``told``: what it is told next, pairs of role and text; or ``reward``, ``truncated`` and ``metrics`` of an
        episode that is over; or its ``fault``.
    """
    return _run(_stage().answer(member, text, complete))


def close() -> None:
    """End the group's episodes."""
    _run(_stage().close_group())
