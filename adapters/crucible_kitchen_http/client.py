"""The adapters ``training_client.http`` and ``sampling_client.http``: options, and what a server says it can do.

Read next: ``crucible_kitchen_http.session``, ``crucible_kitchen_http.sampler``.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import fields
from typing import Any

import anyio
from pydantic import SecretStr

from crucible_kitchen.connections import secret
from crucible_kitchen.errors import BackendError, CapabilityError
from crucible_kitchen.hub_tokenizer import load_tokenizer
from crucible_kitchen.ports import Tokenizer
from crucible_kitchen.ports.training_client import TrainingCapabilities, TrainingSession
from crucible_kitchen.types import JsonObject, SessionInfo, SessionSpec
from crucible_kitchen.workers import Submissions, run_sync
from crucible_kitchen_http.endpoint import Endpoint, EndpointOptions, beat
from crucible_kitchen_http.remote import RemoteModel
from crucible_kitchen_http.sampler import HttpSampler
from crucible_kitchen_http.session import HttpSession
from crucible_kitchen_http.tokenizer import tokenizer_from_files

__all__ = ["HttpSamplingClient", "HttpTrainingClient"]

_MOST = TrainingCapabilities(
    step_scale="exact",
    losses=frozenset({"cross_entropy"}),
    custom_loss="emulated",
    recovery="rollback",
    ordered_accumulation=True,
    lora=True,
    full_weights=True,
    sampling=True,
    export=True,
    reference=True,
    reproducible=True,
)
"""What a server of ours can do; a session is narrowed to what its own server says."""

_LEAST = TrainingCapabilities(
    step_scale="constant",
    losses=_MOST.losses,
    custom_loss="emulated",
    recovery="rollback",
    session_options=False,
    sampling_options=False,
    export=False,
)
"""What every server of the profile can do."""


class HttpTrainingClient:
    """Trains and samples on a training server, over the JSON wire.

    Args:
        base_url: the server, for instance ``http://127.0.0.1:8700``.
        api_key: the server's key; give it as ``env:NAME``. Never shown.
        tokenizer: for a server that gives none: a directory or hub id (needs transformers), or a ``Tokenizer``.
        timeout: seconds that one exchange may take.
        patience: seconds for which a request is sent again while the server cannot be reached.
        max_concurrency: requests under way at once.
        recovery_bytes: calls kept to be sent again should the server restart; beyond it a state is saved in between.
        extensions: the server is one of this project's and knows more than the wire's profile. Say ``false`` for
            another: what it cannot do is then refused by ``validate`` and ``--dry-run``.

    Raises:
        ConfigError: an option has no such value.
    """

    synthetic = False

    def __init__(
        self,
        *,
        base_url: str,
        api_key: SecretStr | str | None = None,
        tokenizer: str | Tokenizer | None = None,
        timeout: float = 60.0,
        patience: float = 120.0,
        max_concurrency: int = 128,
        recovery_bytes: int = 1 << 26,
        extensions: bool = True,
    ) -> None:
        self._options = _options(base_url, api_key, timeout, patience, max_concurrency)
        self._endpoint = Endpoint(self._options)
        self._tokenizer = tokenizer
        self._recovery_bytes = recovery_bytes
        self._extensions = extensions

    @property
    def capabilities(self) -> TrainingCapabilities:
        """What such a server can do, as ``extensions`` says; a session says what its own server can."""
        return _MOST if self._extensions else _LEAST

    def open_session(self, spec: SessionSpec) -> AbstractAsyncContextManager[TrainingSession]:
        """See ``TrainingClient``."""
        return self._open(spec)

    @asynccontextmanager
    async def _open(self, spec: SessionSpec) -> AsyncGenerator[TrainingSession, None]:
        remote = RemoteModel(self._endpoint, _creation(spec), extended=self._extensions)
        failure: Exception | None = None
        try:
            _check_spec(spec, extended=self._extensions)
            await remote.create()
            async with Submissions() as submissions, anyio.create_task_group() as beating:
                beating.start_soon(beat, self._endpoint, lambda: remote.session_id)
                session = await self._session(remote, submissions, spec)
                try:
                    yield session
                except Exception as error:  # noqa: BLE001 - raised below: a task group would wrap it
                    failure = error
                finally:
                    session.close()
                beating.cancel_scope.cancel()
        finally:
            await remote.close()
        if failure is not None:
            raise failure

    async def _session(self, remote: RemoteModel, submissions: Submissions, spec: SessionSpec) -> HttpSession:
        told = await self._endpoint.post("get_info", {"model_id": remote.model_id, "type": "get_info"})
        if remote.extended:
            more = told.get("crucible") or {}
            info = _info(more)
            capabilities = _narrowed(more.get("capabilities") or {})
            files = await self._endpoint.get(f"models/{remote.model_id}/tokenizer")
            tokenizer = await run_sync(tokenizer_from_files, files, info.vocab_size)
        else:
            info, capabilities = _foreign_info(told, spec), _LEAST
            told_name = str((told.get("model_data") or {}).get("tokenizer_id") or spec.model)
            tokenizer = await _given_tokenizer(self._tokenizer, told_name)
        return HttpSession(remote, submissions, info, capabilities, tokenizer, self._recovery_bytes)

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        more = {"recovery_bytes": self._recovery_bytes, "extensions": self._extensions}
        return {**self._options.public(), "tokenizer": _named(self._tokenizer), **more}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._endpoint.aclose()


class HttpSamplingClient:
    """Samples on a training server: from its base model by name, or from saved weights by their path.

    Args:
        base_url: the server, for instance ``http://127.0.0.1:8700``.
        api_key: the server's key; give it as ``env:NAME``. Never shown.
        tokenizer: for a server that gives none: a directory or hub id (needs transformers), or a ``Tokenizer``.
        timeout: seconds that one exchange may take.
        patience: seconds for which a request is sent again while the server cannot be reached.
        max_concurrency: requests under way at once.

    Raises:
        ConfigError: an option has no such value.
    """

    synthetic = False

    def __init__(
        self,
        *,
        base_url: str,
        api_key: SecretStr | str | None = None,
        tokenizer: str | Tokenizer | None = None,
        timeout: float = 60.0,
        patience: float = 120.0,
        max_concurrency: int = 128,
    ) -> None:
        self._options = _options(base_url, api_key, timeout, patience, max_concurrency)
        self._endpoint = Endpoint(self._options)
        self._tokenizer = tokenizer

    @asynccontextmanager
    async def open_sampler(self, model: str) -> AsyncGenerator[HttpSampler, None]:
        """Open a sampler of a base model, or of saved weights by their path.

        Raises:
            ModelNotFound: on entering, the server has no such model.
        """
        opened = await self._endpoint.post(
            "create_session",
            {"tags": [], "user_metadata": {}, "sdk_version": "crucible-kitchen", "type": "create_session"},
        )
        extended = isinstance(opened.get("crucible"), dict)
        weights = {"model_path" if model.startswith("tinker://") else "base_model": model}
        session_id = str(opened.get("session_id"))
        body = {"session_id": session_id, "sampling_session_seq_id": 0, **weights}
        told = await self._endpoint.post("create_sampling_session", body | {"type": "create_sampling_session"})
        name, step = str(told.get("sampling_session_id")), int((told.get("crucible") or {}).get("step", 0))
        sampler = HttpSampler(self._endpoint, name, await self._load(name, model, extended), step, extended=extended)
        failure: Exception | None = None
        async with anyio.create_task_group() as beating:
            beating.start_soon(beat, self._endpoint, lambda: session_id)
            try:
                yield sampler
            except Exception as error:  # noqa: BLE001 - raised below: a task group would wrap it
                failure = error
            finally:
                await sampler.aclose()
            beating.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _load(self, name: str, model: str, extended: bool) -> Tokenizer:
        if extended:
            files = await self._endpoint.get(f"samplers/{name}/tokenizer")
            return await run_sync(tokenizer_from_files, files)
        return await _given_tokenizer(self._tokenizer, model)

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        return {**self._options.public(), "tokenizer": _named(self._tokenizer)}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._endpoint.aclose()


async def _given_tokenizer(given: str | Tokenizer | None, model: str) -> Tokenizer:
    """Return the tokenizer that was given, or the one that belongs to a model's name."""
    if given is None or isinstance(given, str):
        return await run_sync(load_tokenizer, given or model)
    return given


def _named(given: str | Tokenizer | None) -> str | None:
    return given if given is None or isinstance(given, str) else type(given).__name__


def _options(
    base_url: str, api_key: SecretStr | str | None, timeout: float, patience: float, max_concurrency: int
) -> EndpointOptions:
    return EndpointOptions(base_url.rstrip("/"), secret(api_key), float(timeout), float(patience), int(max_concurrency))


def _creation(spec: SessionSpec) -> JsonObject:
    more: JsonObject = {
        "seed": spec.seed,
        "max_length": spec.max_length,
        "chat_template": spec.chat_template,
        "reference": spec.reference,
    }
    body: JsonObject = {"base_model": spec.model, "user_metadata": {"run": spec.run_id}}
    if spec.lora is not None:
        body["lora_config"] = {"rank": spec.lora.rank, "alpha": spec.lora.alpha, "seed": spec.seed}
        more |= {"dropout": spec.lora.dropout, "targets": list(spec.lora.targets)}
    return body | {"crucible": more}


def _check_spec(spec: SessionSpec, *, extended: bool) -> None:
    """Refuse what the wire cannot say, and what a server without extensions was not told."""
    if spec.value_head or spec.mlp is not None:
        raise CapabilityError("the wire carries no value heads and no policies of observations", hint="train locally")
    if extended:
        return
    asked = [name for name in ("dropout", "targets") if spec.lora is not None and getattr(spec.lora, name)]
    asked += ["all weights"] if spec.lora is None else []
    asked += ["a reference"] if spec.reference else []
    asked += ["chat_template"] if spec.chat_template is not None else []
    if asked:
        raise CapabilityError(f"the server cannot be asked for {', '.join(asked)}", hint="leave it out")


def _info(more: Mapping[str, Any]) -> SessionInfo:
    try:
        return SessionInfo(**more["info"])
    except (KeyError, TypeError) as error:
        raise BackendError("the server tells other facts of a model than this client knows") from error


def _narrowed(told: Mapping[str, Any]) -> TrainingCapabilities:
    """Return what both the server and this client can do."""
    known = {f.name for f in fields(TrainingCapabilities)}
    can = {name: value for name, value in told.items() if name in known}
    can["losses"] = frozenset(can.get("losses") or ()) & _MOST.losses
    for name in known - {"losses", "step_scale", "custom_loss", "recovery", "synthetic"}:
        can[name] = bool(can.get(name)) and getattr(_MOST, name)
    can |= {"custom_loss": "emulated", "recovery": "rollback", "synthetic": bool(can.get("synthetic"))}
    can.setdefault("step_scale", "none")
    return TrainingCapabilities(**can)


def _foreign_info(told: JsonObject, spec: SessionSpec) -> SessionInfo:
    data = told.get("model_data") or {}
    return SessionInfo(
        model=spec.model,
        architecture=str(data.get("arch") or ""),
        parameters=0,
        trainable_parameters=0,
        context_length=0,
        vocab_size=0,
        hidden_size=0,
        lora_rank=spec.lora.rank if spec.lora else 0,
    )
