"""Data to messages and replies to results: forwards, gradients of built-in losses, and those of any loss emulated.

A loss is a function of log-probabilities with a derivative. A server that does not know it computes the
log-probabilities, the client the loss, and the server the gradient of a cross-entropy whose weights are the negative
derivative: the same gradient, for one more forward. Knows calls, not sessions. Read next: ``crucible_kitchen.types``.
"""

import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crucible_kitchen.errors import BackendError, BackendUserError, NonFiniteLoss, TrainingError
from crucible_kitchen.types import (
    Array,
    Datum,
    Float64Array,
    ForwardBackwardResult,
    ForwardResult,
    JsonObject,
    Loss,
    LossValue,
    OptimResult,
    OutputsLoss,
)
from crucible_kitchen.wire.codec import datum_to_wire, parse, tensor_from_wire
from crucible_kitchen.wire.messages import TensorData
from crucible_kitchen.wire.metrics import combine_metrics, metrics_from_wire
from crucible_kitchen.workers import run_sync
from crucible_kitchen_http.remote import Call, Place, RemoteModel

__all__ = ["Gradient", "forward", "optim_result", "plain"]

CHUNK = 1024
"""Most data of one request."""

CHUNK_TOKENS = 1 << 18
"""Most tokens of one request, unless one datum has more."""


async def forward(remote: RemoteModel, datums: Sequence[Datum], *, reference: bool = False) -> Awaitable[ForwardResult]:
    """Submit a forward; the result is in the order of the data."""
    more: JsonObject = {"reference": reference} if remote.extended else {}
    calls = await run_sync(_calls, "forward", datums, "cross_entropy", None, more, whole=False)
    replies = [(await remote.send(call), part) for call, part in calls]

    async def finish() -> ForwardResult:
        logprobs: list[Array] = []
        for reply, part in replies:
            logprobs += await run_sync(_logprobs, await reply, part)
        return ForwardResult(logprobs)

    return finish()


@dataclass(frozen=True)
class Gradient:
    """The gradient of some data that is to be added to an accumulation."""

    remote: RemoteModel
    datums: Sequence[Datum]
    place: Place
    order: int | None

    async def built_in(self, loss: str) -> Awaitable[ForwardBackwardResult]:
        """Submit the gradient of a loss that the server has."""
        replies = await self._send(self.datums, loss)

        async def finish() -> ForwardBackwardResult:
            logprobs: list[Array] = []
            metrics: list[tuple[Mapping[str, float], int]] = []
            for reply, part in replies:
                answer = await reply
                logprobs += await run_sync(_logprobs, answer, part)
                metrics.append((_metrics(answer), len(part)))
            found = combine_metrics(metrics)
            total = found.pop("loss:sum", math.nan)
            for name in ("weight:sum", "tokens:sum"):
                found.pop(name, None)
            return self._result(total, logprobs, metrics_from_wire(found))

        return finish()

    async def emulated(self, loss: Loss) -> Awaitable[ForwardBackwardResult]:
        """Ask for log-probabilities, compute the loss, submit the gradient of the cross-entropy that has its own."""
        if len(self.datums) % loss.group:
            raise BackendUserError(f"the loss takes groups of {loss.group} datums, got {len(self.datums)}")
        logprobs = (await (await forward(self.remote, self.datums))).logprobs
        values = await run_sync(_values, loss, self.datums, logprobs)
        total = sum(value.total for value in values)
        if not math.isfinite(total):
            raise NonFiniteLoss("the loss", self.place[0] + 1, [d.key for d in self.datums])
        slopes = [slope for value in values for slope in value.d_logprobs]
        replies = await self._send([_linear(d, s) for d, s in zip(self.datums, slopes, strict=True)], "cross_entropy")
        metrics = combine_metrics([(value.metrics, 1) for value in values])

        async def finish() -> ForwardBackwardResult:
            for reply, _ in replies:
                await reply
            return self._result(total, logprobs, metrics)

        return finish()

    async def _send(self, datums: Sequence[Datum], loss: str) -> list[tuple[Awaitable[JsonObject], Sequence[Datum]]]:
        place = {"step": self.place[0], "attempt": self.place[1], "order": self.order}
        more = place if self.remote.extended else {}
        whole = self.order is not None
        calls = await run_sync(_calls, "forward_backward", datums, loss, self.place, more, whole=whole)
        return [(await self.remote.send(call), part) for call, part in calls]

    def _result(self, loss: float, logprobs: Sequence[Array], metrics: Mapping[str, float]) -> ForwardBackwardResult:
        weight = math.fsum(_weight(d) for d in self.datums)
        return ForwardBackwardResult(loss, weight, sum(len(d) for d in self.datums), logprobs, metrics)


def optim_result(answer: JsonObject, step: int, scale: float) -> OptimResult:
    """Return the result of an optimizer step; ``scale`` makes a norm that the server did not scale that of the step."""
    metrics = {str(name): float(value) for name, value in (answer.get("metrics") or {}).items()}
    norm = metrics.pop("grad_norm", None)
    more = answer.get("crucible") or {}
    return OptimResult(int(more.get("step", step)), math.nan if norm is None else norm * scale, metrics)


def _calls(
    path: str, datums: Sequence[Datum], loss: str, place: Place | None, more: JsonObject, *, whole: bool
) -> list[tuple[Call, Sequence[Datum]]]:
    """Return the requests of some data: one, or where it is large and its place in a sum is free, several.

    ``more`` is what a server that knows our extensions is told.
    """
    calls = []
    for part in [datums] if whole else _parts(datums):
        inputs = {"data": [datum_to_wire(datum) for datum in part], "loss_fn": loss}
        body: JsonObject = {f"{path}_input": inputs}
        if more:
            body["crucible"] = more | {"keys": [datum.key for datum in part]}
        calls.append((Call.of(path, body, place), part))
    return calls


def _parts(datums: Sequence[Datum]) -> list[Sequence[Datum]]:
    parts: list[list[Datum]] = [[]]
    tokens = 0
    for datum in datums:
        tokens += len(datum)
        if parts[-1] and (len(parts[-1]) == CHUNK or tokens > CHUNK_TOKENS):
            parts.append([])
            tokens = len(datum)
        parts[-1].append(datum)
    return list(parts)


def _logprobs(answer: JsonObject, datums: Sequence[Datum]) -> list[Array]:
    outputs = answer.get("loss_fn_outputs")
    if not isinstance(outputs, list) or len(outputs) != len(datums):
        raise BackendError("the server's answer does not hold one output per datum")
    found = [tensor_from_wire(parse(TensorData, output.get("logprobs")), "logprobs") for output in outputs]
    if [len(each) for each in found] != [len(datum) for datum in datums]:
        raise BackendError("the server's answer does not hold one log-probability per position")
    return found


def _metrics(answer: JsonObject) -> dict[str, float]:
    return {str(name): float(value) for name, value in (answer.get("metrics") or {}).items()}


def _values(loss: Loss, datums: Sequence[Datum], logprobs: Sequence[Array]) -> list[LossValue]:
    values = []
    for start in range(0, len(datums), loss.group):
        group = slice(start, start + loss.group)
        try:
            value = loss([np.asarray(lp, np.float64) for lp in logprobs[group]], [d.loss_inputs for d in datums[group]])
        except Exception as error:
            raise TrainingError(f"the loss {loss.name!r} raised {type(error).__name__}") from error
        if [np.shape(d) for d in value.d_logprobs] != [(len(d),) for d in datums[group]]:
            raise TrainingError(
                f"the loss {loss.name!r} returned derivatives of another shape than its log-probabilities"
            )
        values.append(value)
    return values


def _linear(datum: Datum, slope: Any) -> Datum:
    """Return the datum whose cross-entropy has this derivative by the log-probabilities."""
    targets = datum.loss_inputs["target_tokens"]
    return replace(datum, loss_inputs={"target_tokens": targets, "weights": -np.asarray(slope, np.float64)})


def _weight(datum: Datum) -> float:
    weights = datum.loss_inputs.get("weights")
    return float(len(datum)) if weights is None else float(weights.sum(dtype="float64"))


def plain(loss: Loss | OutputsLoss) -> Loss:
    """Return a loss of log-probabilities alone, whichever way it is stated."""
    return loss if not hasattr(loss, "reads") else _OfLogprobs(loss)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _OfLogprobs:
    """A loss of outputs that reads log-probabilities only, as a plain loss."""

    stated: OutputsLoss

    @property
    def name(self) -> str:
        return self.stated.name

    @property
    def group(self) -> int:
        return self.stated.group

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]], /) -> LossValue:
        value = self.stated([{"logprobs": each} for each in logprobs], loss_inputs)
        return LossValue(value.total, [slopes["logprobs"] for slopes in value.slopes], value.metrics)
