"""The training server without HTTP: sessions, models and sampling sessions by name, and the calls on them.

All its tasks live in one group: leaving the block ends them, and what is open is answered as lost. Read next:
``crucible_kitchen.service.models``, ``crucible_kitchen.service.app``.
"""

import base64
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.errors import BackendUserError, ModelNotFound, NotFoundError, SessionLost
from crucible_kitchen.ports import TrainingClient, TrainingSession
from crucible_kitchen.service import operations
from crucible_kitchen.service.exports import Exports
from crucible_kitchen.service.futures import Future, Futures
from crucible_kitchen.service.models import Limits, TrainedModel
from crucible_kitchen.service.samplers import OpenedModel, SamplingSession, draw, draw_of_batch, not_found, reply
from crucible_kitchen.service.weights import WeightsIndex
from crucible_kitchen.types import JsonObject, LoraSpec, SessionSpec
from crucible_kitchen.wire import messages as m
from crucible_kitchen.wire.codec import parse
from crucible_kitchen.workers import run_sync

__all__ = ["TrainingServer"]


@dataclass
class _Client:
    """One session of a client: what it made, and when it was last heard of."""

    heard: float
    models: dict[int, TrainedModel] = field(default_factory=dict)
    created: dict[int, Future] = field(default_factory=dict)
    sampling: set[str] = field(default_factory=set)


class TrainingServer:
    """Serves one base model for training and sampling. Use :meth:`open`.

    Args:
        client: what trains.
        model: the base model, as the training client takes it.
        home: the state directory.
        limits: what is allowed.
        loaded: called once, when a first session is open and what sessions need is in memory.
    """

    def __init__(
        self,
        client: TrainingClient,
        model: str,
        home: Path,
        limits: Limits | None = None,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.client = client
        self.model = model
        self.limits = limits or Limits()
        self.futures = Futures()
        self.index = WeightsIndex(home.absolute())
        self.exports = Exports(home.absolute() / "exports")
        self.ended = anyio.Event()
        self._names = {model, Path(model).name} if Path(model).name else {model}
        self._clients: dict[str, _Client] = {}
        self._models: dict[str, TrainedModel] = {}
        self._sampling: dict[str, SamplingSession] = {}
        self._opened: OrderedDict[str, OpenedModel] = OrderedDict()
        self._loaded: Callable[[], None] | None = loaded
        self._life = secrets.token_hex(6)
        self._group: anyio.abc.TaskGroup

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["TrainingServer", None]:
        """Serve inside the block."""
        await run_sync(self.exports.clear)
        async with anyio.create_task_group() as self._group:
            self._group.start_soon(self._let_go_of_the_silent)
            try:
                yield self
            finally:
                self.end()
                self._group.cancel_scope.cancel()

    def end(self) -> None:
        """Answer what is open as lost and take nothing new. Idempotent."""
        self.ended.set()
        for session in self._sampling.values():
            session.end(SessionLost("the server has ended"))
        self.futures.end()

    async def _let_go_of_the_silent(self) -> None:
        """Close the sessions whose clients were not heard of for long."""
        while True:
            await anyio.sleep(self.limits.session / 10)
            horizon = anyio.current_time() - self.limits.session
            for name in [name for name, client in self._clients.items() if client.heard < horizon]:
                self.finish(name)

    # Sessions

    def create_session(self, body: JsonObject) -> JsonObject:
        """Open a session for a client."""
        parse(m.CreateSession, body)
        name = f"{self._life}{secrets.token_hex(6)}"
        self._clients[name] = _Client(anyio.current_time())
        return {"type": "create_session", "session_id": name, "crucible": {"version": m.VERSION}}

    def heartbeat(self, body: JsonObject) -> JsonObject:
        """Note that a client lives."""
        self._client(_text(body, "session_id"))
        return {"type": "session_heartbeat"}

    def finish(self, session_id: str) -> JsonObject:
        """Close a session and all that it made."""
        client = self._clients.pop(session_id, None)
        for model in list(client.models.values()) if client else []:
            self._unload(model)
        for name in client.sampling if client else ():
            self._close_sampling(name)
        return {}

    def _client(self, session_id: str) -> _Client:
        client = self._clients.get(session_id)
        if client is None:
            raise self._unknown("session", session_id)
        client.heard = anyio.current_time()
        return client

    def _unknown(self, what: str, name: str) -> Exception:
        """Return the error of a name: lost if it may have been ours in an earlier life, else unknown."""
        first = name.partition(":")[0]
        if len(first) == 2 * len(self._life) and first.isalnum():
            return SessionLost(f"the {what} is gone: the server has restarted or closed it", hint="create it again")
        return NotFoundError(f"there is no {what} {name[:64]!r}")

    # Models

    def create_model(self, body: JsonObject) -> Future:
        """Open a model to train; one of a number that was asked for before is the same model."""
        message = parse(m.CreateModel, body)
        client = self._client(message.session_id)
        if message.model_seq_id in client.created:
            return client.created[message.model_seq_id]
        if message.base_model not in self._names:
            raise ModelNotFound(
                f"this server has no model {message.base_model[:64]!r}", hint=f"it serves {Path(self.model).name!r}"
            )
        name = f"{message.session_id}:train:{message.model_seq_id}"
        future = self.futures.create()
        model = TrainedModel(name, self._open_session, self._spec(message, name), self.futures, self.limits)
        client.created[message.model_seq_id] = future
        client.models[message.model_seq_id] = self._models[name] = model
        self._group.start_soon(model.run, future)
        return future

    @asynccontextmanager
    async def _open_session(self, spec: SessionSpec) -> AsyncGenerator[TrainingSession, None]:
        async with self.client.open_session(spec) as session:
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                loaded()
            yield session

    def _spec(self, message: m.CreateModel, name: str) -> SessionSpec:
        more = message.crucible or m.ModelExtension()
        lora, seed = None, more.seed
        if message.lora_config is not None:
            given = message.lora_config
            lora = LoraSpec(given.rank, given.alpha, more.dropout, tuple(more.targets))
            seed = given.seed if given.seed is not None else more.seed
        directory = str(self.index.states(name))
        spec = SessionSpec(self.model, lora, seed, directory, name, more.max_length, more.chat_template)
        return replace(spec, reference=more.reference)

    def _model(self, body: JsonObject) -> TrainedModel:
        name = _text(body, "model_id")
        model = self._models.get(name)
        if model is None:
            raise self._unknown("model", name)
        self._client(name.partition(":")[0])
        return model

    async def get_info(self, body: JsonObject) -> JsonObject:
        """Return facts about a model."""
        model = self._model(body)
        session = await model.ready()
        info, can = asdict(session.info), asdict(session.capabilities)
        can["losses"] = sorted(can["losses"])
        return {
            "type": "get_info",
            "model_id": model.id,
            "model_data": {"arch": info["architecture"], "model_name": self.model, "tokenizer_id": self.model},
            "is_lora": model.spec.lora is not None,
            "lora_rank": info["lora_rank"],
            "model_name": self.model,
            "crucible": {"info": info, "capabilities": can, "step": session.position},
        }

    async def weights_info(self, body: JsonObject) -> JsonObject:
        """Say what saved weights belong to."""
        saved = await run_sync(self.index.get, _text(body, "tinker_path"))
        lora = saved.spec.lora
        told = {"base_model": self.model, "is_lora": lora is not None, "lora_rank": lora.rank if lora else None}
        return told | {"train_mlp": True, "train_attn": True, "train_unembed": False}

    async def tokenizer(self, model_id: str) -> JsonObject:
        """Return the files of a model's tokenizer, each in base64."""
        session = await self._model({"model_id": model_id}).ready()
        files = await run_sync(session.tokenizer.files)
        return _encoded(files)

    def submit(self, kind: str, body: JsonObject) -> Future:
        """Take a call on a model."""
        model, number = self._model(body), _number(body, "seq_id")
        if kind == "forward":
            return model.submit(number, operations.forward(body))
        if kind == "forward_backward":
            return model.submit(number, operations.forward_backward(body))
        if kind == "optim_step":
            return model.submit(number, operations.optim_step(body))
        if kind == "save_weights":
            return model.submit(number, operations.save_weights(body, self.index))
        if kind == "load_weights":
            return model.submit(number, operations.load_weights(body, self.index))
        if kind == "export_model":
            return model.submit(number, operations.export_model(self.exports))
        return self._save_sampler(model, number, body)

    def _save_sampler(self, model: TrainedModel, number: int | None, body: JsonObject) -> Future:
        session_id = model.id.partition(":")[0]
        message = parse(m.SaveWeightsForSampler, body)
        if message.path is None and message.sampling_session_seq_id is not None:
            key = f"{session_id}:sample:{message.sampling_session_seq_id}"
            self._keep_sampling(session_id, SamplingSession(key, self.model, model=model))
        return model.submit(number, operations.save_sampler(body, self.index, session_id))

    def unload(self, body: JsonObject) -> JsonObject:
        """Close a model."""
        model = self._model(body)
        self._unload(model)
        return {"type": "unload_model", "model_id": model.id}

    def _unload(self, model: TrainedModel) -> None:
        model.close()
        self._models.pop(model.id, None)
        self.exports.forget(model.id)

    # Sampling

    async def create_sampling_session(self, body: JsonObject) -> JsonObject:
        """Open a session for sampling from saved weights or the base model."""
        message = parse(m.CreateSamplingSession, body)
        self._client(message.session_id)
        name = f"{message.session_id}:sample:{message.sampling_session_seq_id}"
        if name not in self._sampling:
            session = await self._from_saved(name, message)
            self._keep_sampling(message.session_id, session)
        return {"type": "create_sampling_session", "sampling_session_id": name}

    async def _from_saved(self, name: str, message: m.CreateSamplingSession) -> SamplingSession:
        if message.model_path is None:
            if message.base_model not in self._names:
                raise ModelNotFound(f"this server has no model {str(message.base_model)[:64]!r}")
            spec = SessionSpec(self.model, None, 0, str(self.index.states("base")))
            return SamplingSession(name, self.model, None, opened=self._open("", spec, None))
        saved = await run_sync(self.index.get, message.model_path)
        spec = replace(saved.spec, model=self.model)
        opened = self._open(f"{saved.path}#{saved.state.uri}", spec, saved)
        return SamplingSession(name, self.model, saved.path, opened=opened)

    def _open(self, key: str, spec: SessionSpec, saved: Any) -> OpenedModel:
        """Return a model opened for sampling; those that were used longest ago make room."""
        if key in self._opened and not self._opened[key].failure:
            self._opened.move_to_end(key)
            return self._opened[key]
        opened = self._opened[key] = OpenedModel(self._open_session, spec, saved.state if saved else None)
        self._group.start_soon(opened.run)
        while len(self._opened) > self.limits.opened:
            self._opened.popitem(last=False)[1].closing.set()
        return opened

    def _keep_sampling(self, session_id: str, session: SamplingSession) -> None:
        self._sampling.setdefault(session.id, session)
        self._clients[session_id].sampling.add(session.id)

    def _close_sampling(self, name: str) -> None:
        session = self._sampling.pop(name, None)
        if session is None:
            return
        session.end(SessionLost("the sampler was closed while the request was open"))
        for future in session.numbered.values():
            if future.scope is not None:
                future.scope.cancel()
            self.futures.release(future)

    def sampling_session(self, name: str) -> SamplingSession:
        """Return a sampling session by its name."""
        found = self._sampling.get(name)
        if found is None:
            error = self._unknown("sampling session", name)
            raise error if isinstance(error, SessionLost) else not_found(name)
        self._client(name.partition(":")[0])
        return found

    async def sampler_tokenizer(self, name: str) -> JsonObject:
        """Return the files of the tokenizer of a sampling session's model, each in base64."""
        sampler = await self.sampling_session(name).sampler()
        return _encoded(await run_sync(sampler.tokenizer.files))

    async def close_sampling(self, body: JsonObject) -> JsonObject:
        """Close a sampling session and free its weights."""
        session = self.sampling_session(_text(body, "sampling_session_id"))
        sampler = session.model.samplers.pop(session.id, None) if session.model else None
        self._close_sampling(session.id)
        if sampler is not None:
            await sampler.aclose()
        return {}

    def sample(self, body: JsonObject) -> Future:
        """Take a request to sample."""
        session = self.sampling_session(_text(body, "sampling_session_id"))
        future, new = session.submit(_number(body, "seq_id"), self.futures, self.limits)
        if new:
            self._group.start_soon(draw, session, future, body)
        return future

    async def sample_batch(self, body: JsonObject) -> bytes:
        """Take requests to sample, as many as there is room for; return answers once there are some, if asked to."""
        batch = parse(m.SampleBatch, body)
        session = self.sampling_session(batch.sampling_session_id)
        session.receive(batch.received, self.futures)
        bodies = {_batch_number(each): each for each in batch.requests}
        taken, left = session.submit_all(bodies, self.futures, self.limits)
        for number, future in taken.items():
            self._group.start_soon(draw_of_batch, session, number, future, bodies[number])
        answers = [] if batch.wait is None else await session.gathered(min(batch.wait, self.limits.hold))
        return reply(answers, left)

    def cancel(self, body: JsonObject) -> JsonObject:
        """Cancel a request to sample; others run to their end."""
        if "request_id" in body:
            future = self.futures.find(_text(body, "request_id"))
        else:
            session = self.sampling_session(_text(body, "sampling_session_id"))
            found = session.numbered.get(_number(body, "seq_id") or 0)
            if found is None:
                return {}
            future = found
        if future.scope is not None:
            future.scope.cancel()
        return {}


def _encoded(files: Mapping[str, bytes]) -> JsonObject:
    return {"files": {name: base64.b64encode(data).decode() for name, data in files.items()}}


def _text(body: JsonObject, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise BackendUserError(f"field {name!r}: a text is needed")
    return value


def _batch_number(body: JsonObject) -> int:
    number = _number(body, "seq_id")
    if number is None:
        raise BackendUserError("field 'seq_id': a request of a batch needs its number")
    return number


def _number(body: JsonObject, name: str) -> int | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53):
        raise BackendUserError(f"field {name!r}: a whole number is needed")
    return value
