"""The noop training client: opens sessions on the toy model, with any capability switched off for tests.

Knows no engine. Read next: ``crucible_kitchen_noop.session``.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import Any

import anyio.lowlevel

from crucible_kitchen.errors import CapabilityError, ConfigError, ModelNotFound
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.types import JsonObject, SessionSpec
from crucible_kitchen.workers import Submissions
from crucible_kitchen_noop.session import NoopSession

__all__ = ["NoopTrainingClient"]

_CAPABILITIES = TrainingCapabilities(
    step_scale="exact",
    losses=frozenset({"cross_entropy"}),
    custom_loss="honoured",
    recovery="rollback",
    ordered_accumulation=True,
    lora=True,
    full_weights=True,
    entropy=True,
    value_head=True,
    topk_logprobs=True,
    full_logits=True,
    reference=True,
    reproducible=True,
    synthetic=True,
)
_FIXED = {"synthetic", "losses", "mlp", "shared_prefix", "session_options", "sampling_options"}


class NoopTrainingClient:
    """Trains a bigram model of bytes under whatever name was asked for; needs no service, thread or package.

    Args:
        models: the names that exist; empty: all.
        latency: seconds each call takes, for tests of overlap and cancellation on a virtual clock.
        capabilities: what to pretend to lack, by the names of ``TrainingCapabilities``, for instance
            ``{"step_scale": "constant", "recovery": "none"}``; what is switched off is really refused.
    """

    def __init__(
        self, *, models: Sequence[str] = (), latency: float = 0.0, capabilities: Mapping[str, Any] | None = None
    ) -> None:
        self._models = tuple(models)
        self._latency = float(latency)
        self._overrides = dict(capabilities or {})
        allowed = {f.name for f in fields(TrainingCapabilities)} - _FIXED
        if unknown := self._overrides.keys() - allowed:
            raise ConfigError(f"cannot override {sorted(unknown)}", hint=f"possible: {', '.join(sorted(allowed))}")
        self._capabilities = replace(_CAPABILITIES, **self._overrides)

    @property
    def capabilities(self) -> TrainingCapabilities:
        """What it can do, the overrides applied."""
        return self._capabilities

    @property
    def synthetic(self) -> bool:
        """Always: the model is a toy whatever its name."""
        return True

    @asynccontextmanager
    async def open_session(self, spec: SessionSpec) -> AsyncGenerator[NoopSession, None]:
        """Open a session on the toy model."""
        await anyio.lowlevel.checkpoint()
        self._check(spec)
        async with Submissions() as submissions:
            session = NoopSession(spec, self._capabilities, submissions, self._latency)
            try:
                yield session
            finally:
                session.close()

    def public_options(self) -> JsonObject:
        """Return all options; none is secret."""
        return {"models": list(self._models), "latency": self._latency, "capabilities": self._overrides}

    async def aclose(self) -> None:
        """Nothing is held."""

    def _check(self, spec: SessionSpec) -> None:
        if self._models and spec.model not in self._models:
            raise ModelNotFound(f"there is no model {spec.model!r}", hint=f"models: {', '.join(self._models)}")
        if spec.lora is None and not self._capabilities.full_weights:
            raise CapabilityError("this backend trains LoRA only", hint="set lora_rank")
        if spec.lora is not None and not self._capabilities.lora:
            raise CapabilityError("this backend trains all weights only", hint="set lora_rank=0")
        if spec.lora is not None and (spec.lora.dropout or spec.lora.targets):
            raise CapabilityError("the toy model has one layer and no dropout", hint="leave out lora_dropout, targets")
        if spec.value_head and not self._capabilities.value_head:
            raise CapabilityError("this backend has no value head", hint="use advantage=grpo, dr_grpo, rloo or centred")
        if spec.reference and not self._capabilities.reference:
            raise CapabilityError("this backend keeps no reference", hint="open another session as the reference")
        if spec.mlp is not None:
            raise CapabilityError("the toy model takes tokens, not observations", hint="use training_client=torch")
        if spec.chat_template is not None:
            raise CapabilityError("the toy tokenizer has a fixed chat format", hint="leave out chat_template")
