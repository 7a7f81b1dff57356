"""A training session on a server: the port's verbs as calls of the wire.

What the server said it can do decides how a verb is sent: whole, emulated, or not at all. Read next:
``crucible_kitchen_http.remote``, ``crucible_kitchen_http.gradients``.
"""

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import anyio

from crucible_kitchen.errors import BackendUserError, CapabilityError, SessionLost
from crucible_kitchen.ports.sampling_client import Policy
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.ports.training_client import TrainingCapabilities, TrainingStepScope, require_outputs
from crucible_kitchen.types import (
    AdamParams,
    Datum,
    ExportedModel,
    ForwardResult,
    JsonObject,
    OptimResult,
    SessionInfo,
    StateRef,
)
from crucible_kitchen.workers import PendingResult, Submissions, run_sync
from crucible_kitchen_http import gradients
from crucible_kitchen_http.export import check_directory, fetch
from crucible_kitchen_http.remote import Call, Place, RemoteModel, Start
from crucible_kitchen_http.sampler import HttpSampler
from crucible_kitchen_http.steps import StepScope

__all__ = ["HttpSession"]

R = TypeVar("R")


class HttpSession:
    """See ``TrainingSession``. Calls are submitted in order and answered while later ones are submitted.

    Args:
        remote: the model on its server.
        submissions: the session's open calls.
        info: facts about the model.
        capabilities: what the server can do.
        tokenizer: the model's.
        recovery_bytes: how many bytes of calls are kept before a state is saved in between.
    """

    def __init__(
        self,
        remote: RemoteModel,
        submissions: Submissions,
        info: SessionInfo,
        capabilities: TrainingCapabilities,
        tokenizer: Tokenizer,
        recovery_bytes: int,
    ) -> None:
        self.remote = remote
        self.scale: float | None = None
        self._submissions = submissions
        self._info = info
        self._capabilities = capabilities
        self._tokenizer = tokenizer
        self._recovery_bytes = recovery_bytes
        self._position = 0
        self._applied: PendingResult[OptimResult] | None = None
        self._scope: StepScope | None = None
        self._attempt = 0
        self._samplers = 0
        self._securing: PendingResult[StateRef] | None = None
        self._names: dict[str, StateRef] = {}
        self._stale = False
        self._closed = False

    def close(self) -> None:
        """Refuse all further calls."""
        self._closed = True

    @property
    def info(self) -> SessionInfo:
        """See ``TrainingSession``."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """See ``TrainingSession``."""
        return self._tokenizer

    @property
    def capabilities(self) -> TrainingCapabilities:
        """See ``TrainingSession``."""
        return self._capabilities

    @property
    def position(self) -> int:
        """See ``TrainingSession``."""
        return self._position

    def step(self, index: int) -> AbstractAsyncContextManager[TrainingStepScope]:
        """See ``TrainingSession``; the index is checked on entering, once earlier steps have ended."""
        return self._step(index)

    @asynccontextmanager
    async def _step(self, index: int) -> AsyncGenerator[TrainingStepScope, None]:
        self._leave()
        if self._applied is not None:
            await _ended(self._applied)
        self._submissions.check()
        await self._secure()
        if index != self._position:
            raise BackendUserError(
                f"step {index} cannot be opened: the session is at step {self._position}",
                hint="load the state of that step first",
            )
        if self._stale:
            await self._call(self._reset)
        self._attempt += 1
        scope = self._scope = StepScope(self, (index, self._attempt))
        try:
            yield scope
        finally:
            if self._scope is scope:
                self._leave()

    async def _secure(self) -> None:
        """Wait for the state that replaces kept calls, if there are far too many; a failed one is tried again later."""
        if self._securing is None:
            return
        if self.remote.kept_bytes > 2 * self._recovery_bytes or self._securing.done:
            await _ended(self._securing)
            self._securing = None

    async def _reset(self) -> Awaitable[None]:
        """Drop what a server that cannot drop has accumulated: make its model again."""
        await self.remote.reset()
        self._stale = False
        return _nothing()

    def _leave(self) -> None:
        """Drop the open accumulation, unless it was applied."""
        scope, self._scope = self._scope, None
        if scope is not None and not scope.applied:
            scope.drop()
            self.remote.drop(scope.place)
            self._stale = scope.sent and not self.remote.extended

    def submit(self, call: Callable[[], Awaitable[Awaitable[R]]]) -> PendingResult[R]:
        """Submit a call behind all others."""
        if self._closed:
            raise SessionLost("the session is closed", hint="open a new one and load its last state")
        return self._submissions.send(call)

    async def _call(self, call: Callable[[], Awaitable[Awaitable[R]]]) -> R:
        return await self.submit(call)

    async def forward(
        self,
        datums: Sequence[Datum],
        *,
        outputs: Collection[str] = ("logprobs",),
        top: int = 0,
        reference: bool = False,
    ) -> PendingResult[ForwardResult]:
        """See ``TrainingSession``; the wire carries log-probabilities of targets."""
        await anyio.lowlevel.checkpoint()
        require_outputs(self._capabilities, outputs)
        if top:
            raise BackendUserError("top belongs to the output top_logprobs, which the server does not give")
        if reference and not self._capabilities.reference:
            raise CapabilityError(
                "the session keeps no reference", hint="open it with reference=True on a server that can"
            )
        return self.submit(lambda: gradients.forward(self.remote, tuple(datums), reference=reference))

    async def apply(self, place: Place, params: AdamParams, scale: float) -> PendingResult[OptimResult]:
        """Submit an optimizer step."""
        call = Call.of("optim_step", self._optim_body(place, params, scale), place)

        async def send() -> Awaitable[OptimResult]:
            reply = await self.remote.send(call)

            async def finish() -> OptimResult:
                try:
                    result = gradients.optim_result(await reply, place[0] + 1, 1.0 if self.remote.extended else scale)
                except Exception:
                    self.remote.drop(place)
                    raise
                self._position = result.step
                return result

            return finish()

        self._applied = pending = self.submit(send)
        if self.remote.kept_bytes > self._recovery_bytes and self._securing is None:
            self._securing = self.submit(lambda: self._save("recovery"))
            self._securing.excuse()
        return pending

    def _optim_body(self, place: Place, params: AdamParams, scale: float) -> JsonObject:
        """Return the message; a server that does not scale gets an optimizer whose update is the scaled one's.

        AdamW of ``s g`` with (eps, clip) is AdamW of ``g`` with (eps / s, clip / s), for one ``s`` throughout.

        Raises:
            CapabilityError: the server does not scale, and the scale is another one than before.
        """
        eps, clip = params.eps, params.grad_clip_norm
        if not self.remote.extended:
            if self.scale not in (None, scale) or not scale > 0:
                raise CapabilityError(
                    f"the server keeps one scale for a whole run: {self.scale}, then {scale}",
                    hint="multiply the weights instead",
                )
            self.scale = scale
            eps, clip = eps / scale, clip / scale
        adam = {
            "learning_rate": params.learning_rate,
            "beta1": params.beta1,
            "beta2": params.beta2,
            "eps": eps,
            "weight_decay": params.weight_decay,
            "grad_clip_norm": clip,
        }
        body: JsonObject = {"adam_params": adam, "type": "optim_step"}
        if self.remote.extended:
            body["crucible"] = {"step": place[0], "attempt": place[1], "scale": scale}
        return body

    async def save_state(self, name: str) -> PendingResult[StateRef]:
        """See ``TrainingSession``; the state is the server's."""
        await anyio.lowlevel.checkpoint()
        return self.submit(lambda: self._save(name))

    async def _save(self, name: str) -> Awaitable[StateRef]:
        """Save under a name of its own; the state that had the name goes once the new one is whole."""
        unique = f"{name}-{secrets.token_hex(4)}"
        call = Call.of("save_weights", {"path": unique, "overwrite": True, "type": "save_weights"})
        reply = await self.remote.send(call)
        position = self._position

        async def finish() -> StateRef:
            answer = await reply
            more = answer.get("crucible") or {}
            step, size = int(more.get("step", position)), int(more.get("size", 0))
            state = StateRef(str(answer.get("path")), step, str(more.get("sha256", "")), size)
            await self.remote.saved(state, call)
            older = self._names.get(name)
            self._names[name] = state
            if older is not None:
                await self.remote.delete(older)
            return state

        return finish()

    async def load_state(self, state: StateRef) -> None:
        """See ``TrainingSession``."""
        await self._load(Start(state))

    async def load_weights(self, state: StateRef) -> None:
        """See ``TrainingSession``."""
        await self._load(Start(state, optimizer=False))

    async def _load(self, start: Start) -> None:
        self._leave()
        self.remote.check_loadable(start.state)
        await self._call(lambda: self._loading(start))

    async def _loading(self, start: Start) -> Awaitable[None]:
        call = start.call()
        reply = await self.remote.send(call)

        async def finish() -> None:
            more = (await reply).get("crucible") or {}
            await self.remote.begun(start, call)
            self._position = int(more.get("step", start.step))
            self._stale = False

        return finish()

    async def delete_state(self, state: StateRef) -> None:
        """See ``TrainingSession``."""
        await self.remote.delete(state)

    async def sampler(self) -> HttpSampler:
        """See ``TrainingSession``; its weights live on the server until it is closed, and end with the server."""
        return await self._call(self._sampler)

    async def _sampler(self) -> Awaitable[HttpSampler]:
        self._samplers += 1
        body = {"sampling_session_seq_id": self._samplers, "kind": "snapshot", "type": "save_weights_for_sampler"}
        reply = await self.remote.send(Call.of("save_weights_for_sampler", body))
        position = self._position

        async def finish() -> HttpSampler:
            answer = await reply
            step = int((answer.get("crucible") or {}).get("step", position))
            name = str(answer.get("sampling_session_id"))
            return HttpSampler(self.remote.endpoint, name, self._tokenizer, step, extended=self.remote.extended)

        return finish()

    async def policy(self) -> Policy:
        """See ``TrainingSession``."""
        raise CapabilityError("the wire carries language models only", hint="train policies of observations locally")

    async def export(self, directory: str) -> ExportedModel:
        """See ``TrainingSession``; the model is written by the server and fetched from it."""
        if not self._capabilities.export:
            raise CapabilityError("the server gives no weights away")
        await run_sync(check_directory, Path(directory))
        for _ in range(2):
            with suppress(SessionLost):  # a server that restarts between the two forgets what it wrote
                return await self._export(Path(directory))
        return await self._export(Path(directory))

    async def _export(self, directory: Path) -> ExportedModel:
        async def send() -> Awaitable[JsonObject]:
            return await self.remote.send(Call.of("export_model", {"type": "export_model"}))

        return await fetch(self.remote.endpoint, await self.submit(send), directory)


async def _ended(pending: PendingResult[Any]) -> None:
    try:
        await pending
    except Exception:  # noqa: BLE001 - told to whoever awaits it
        return


async def _nothing() -> None:
    return
