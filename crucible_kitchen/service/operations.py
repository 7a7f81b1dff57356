"""The calls on a model: each reads its message, submits to the session when its turn has come, and writes the answer.

A message that cannot be read is an error of its own call: its number in the sequence is used, so that the calls after
it run. Knows messages and the training port. Read next: ``crucible_kitchen.service.models``.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError
from crucible_kitchen.ports import Pending
from crucible_kitchen.service.exports import Exports
from crucible_kitchen.service.models import Answer, Operation, TrainedModel
from crucible_kitchen.service.weights import Kind, SavedWeights, WeightsIndex
from crucible_kitchen.types import (
    AdamParams,
    Datum,
    ForwardBackwardResult,
    ForwardResult,
    JsonObject,
    OptimResult,
    StateRef,
)
from crucible_kitchen.wire import messages as m
from crucible_kitchen.wire.codec import datum_from_wire, dumps, parse, tensor_to_wire
from crucible_kitchen.wire.metrics import metrics_to_wire
from crucible_kitchen.workers import run_sync

__all__ = [
    "export_model",
    "forward",
    "forward_backward",
    "load_weights",
    "optim_step",
    "save_sampler",
    "save_weights",
    "saved_answer",
]


def forward(body: JsonObject) -> Operation:
    """Compute log-probabilities of a message's data."""

    async def run(model: TrainedModel) -> Answer:
        message, datums = await run_sync(_forward_data, body)
        reference = message.crucible is not None and message.crucible.reference
        return _forward_answer(await model.session.forward(datums, reference=reference), datums)

    return run


def forward_backward(body: JsonObject) -> Operation:
    """Add a gradient to the open accumulation, or to the one that the message names."""

    async def run(model: TrainedModel) -> Answer:
        message, datums = await run_sync(_backward_data, body)
        place = message.crucible
        step = await model.step(place.step if place else None, place.attempt if place else None)
        loss = message.forward_backward_input.loss_fn
        order = place.order if place else None
        return _backward_answer(await step.forward_backward(datums, loss, order=order))

    return run


def optim_step(body: JsonObject) -> Operation:
    """Apply the open accumulation."""

    async def run(model: TrainedModel) -> Answer:
        message = parse(m.OptimStep, body)
        place = message.crucible
        step = await model.step(place.step if place else None, place.attempt if place else None)
        params = AdamParams(**message.adam_params.model_dump())
        pending = await step.apply(params, scale=place.scale if place else 1.0)
        await model.applied(pending)
        return _optim_answer(pending)

    return run


def save_weights(body: JsonObject, index: WeightsIndex) -> Operation:
    """Save weights, optimizer and random state."""

    async def run(model: TrainedModel) -> Answer:
        message = parse(m.SaveWeights, body)
        await run_sync(_check, index, model, "weights", message.path, overwrite=message.overwrite)
        pending = await model.session.save_state(f"w-{secrets.token_hex(8)}")
        return _saved(pending, model, index, "weights", message.path)

    return run


def load_weights(body: JsonObject, index: WeightsIndex) -> Operation:
    """Restore what was saved, or only its weights."""

    async def run(model: TrainedModel) -> Answer:
        message = parse(m.LoadWeights, body)
        saved = await run_sync(index.get, message.path)
        await model.drop_step()
        load = model.session.load_state if message.optimizer else model.session.load_weights
        await load(saved.state)
        position = model.session.position
        return _ready({"type": "load_weights", "path": message.path, "crucible": {"step": position}})

    return run


def save_sampler(body: JsonObject, index: WeightsIndex, session_id: str) -> Operation:
    """Save weights for sampling under a name, or keep a sampler of them while the model lives."""

    async def run(model: TrainedModel) -> Answer:
        message = parse(m.SaveWeightsForSampler, body)
        if message.path is not None:
            await run_sync(_check, index, model, "sampler_weights", message.path, overwrite=True)
            pending = await model.session.save_state(f"s-{secrets.token_hex(8)}")
            return _saved(pending, model, index, "sampler_weights", message.path)
        if message.sampling_session_seq_id is None:
            raise BackendUserError("save_weights_for_sampler needs a path or a sampling_session_seq_id")
        sampler = await model.session.sampler()
        key = f"{session_id}:sample:{message.sampling_session_seq_id}"
        await model.keep_sampler(key, sampler)
        answer = {"type": "save_weights_for_sampler", "sampling_session_id": key}
        return _ready(answer | {"crucible": {"step": sampler.version}})

    return run


def export_model(exports: Exports) -> Operation:
    """Write the model for use elsewhere into an archive that its client fetches."""

    async def run(model: TrainedModel) -> Answer:
        directory = await run_sync(exports.begin, model.id)
        exported = await model.session.export(str(directory))
        return _ready(await run_sync(exports.pack, exported))

    return run


def saved_answer(saved: SavedWeights, kind: Kind) -> JsonObject:
    """Return what a save is answered with."""
    state = saved.state
    kinds = {"weights": "save_weights", "sampler_weights": "save_weights_for_sampler"}
    extension = {"step": state.step, "sha256": state.sha256, "size": state.size}
    return {"type": kinds[kind], "path": saved.path, "crucible": extension}


def _check(index: WeightsIndex, model: TrainedModel, kind: Kind, name: str, *, overwrite: bool) -> None:
    index.check_name(name)
    if not overwrite:
        index.check_free(model.id, kind, name)


async def _saved(
    pending: Pending[StateRef], model: TrainedModel, index: WeightsIndex, kind: Kind, name: str
) -> JsonObject:
    state = await pending
    return saved_answer(await run_sync(index.put, model.id, kind, name, state, model.spec), kind)


async def _ready(answer: JsonObject) -> JsonObject:
    return answer


def _forward_data(body: JsonObject) -> tuple[m.Forward, list[Datum]]:
    message = parse(m.Forward, body)
    return message, _datums(message.forward_input, message.crucible.keys if message.crucible else None)


def _backward_data(body: JsonObject) -> tuple[m.ForwardBackward, list[Datum]]:
    message = parse(m.ForwardBackward, body)
    return message, _datums(message.forward_backward_input, message.crucible.keys if message.crucible else None)


def _datums(given: m.ForwardBackwardInput, keys: list[str] | None) -> list[Datum]:
    if given.loss_fn_config:
        raise CapabilityError("the losses of this server take no loss_fn_config", hint="leave it out")
    keys = keys or [f"datum {i}" for i in range(len(given.data))]
    if len(keys) != len(given.data):
        raise BackendUserError(f"{len(keys)} keys were given for {len(given.data)} data")
    return [datum_from_wire(datum, key) for datum, key in zip(given.data, keys, strict=True)]


async def _forward_answer(pending: Pending[ForwardResult], datums: Sequence[Datum]) -> bytes:
    result = await pending
    loss = 0.0
    for datum, logprobs in zip(datums, result.logprobs, strict=True):
        weights = datum.loss_inputs.get("weights")
        loss -= float(np.sum(logprobs if weights is None else weights * logprobs))
    return await run_sync(_outputs, "forward", result.logprobs, {"loss:sum": loss})


async def _backward_answer(pending: Pending[ForwardBackwardResult]) -> bytes:
    result = await pending
    metrics = {"loss:sum": result.loss, "weight:sum": result.weight, "tokens:sum": float(result.tokens)}
    metrics |= metrics_to_wire(result.metrics)
    return await run_sync(_outputs, "forward_backward", result.logprobs, metrics)


def _outputs(kind: str, logprobs: Sequence[Any], metrics: Mapping[str, float]) -> bytes:
    outputs = [{"logprobs": tensor_to_wire(np.asarray(each))} for each in logprobs]
    return dumps({"type": kind, "loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": metrics})


async def _optim_answer(pending: Pending[OptimResult]) -> JsonObject:
    result = await pending
    metrics = {"grad_norm": result.grad_norm, **result.metrics}
    return {"type": "optim_step", "metrics": metrics, "crucible": {"step": result.step}}
