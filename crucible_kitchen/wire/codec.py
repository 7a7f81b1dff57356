"""Bytes to values and back: JSON, tensors, datums.

Numbers survive exactly: a float is written with as many digits as it needs, NaN and the infinities as the words that
Python's ``json`` also reads and writes. Read next: ``crucible_kitchen.wire.messages``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from crucible_kitchen.errors import BackendUserError
from crucible_kitchen.types import Array, Datum, JsonObject
from crucible_kitchen.wire.messages import ModelInput, TensorData, WireDatum

__all__ = [
    "datum_from_wire",
    "datum_to_wire",
    "dumps",
    "loads",
    "parse",
    "tensor_from_wire",
    "tensor_to_wire",
    "token_ids",
    "tokens_from_wire",
]

M = TypeVar("M", bound=BaseModel)

_DTYPES = {"int64": np.int64, "float32": np.float32}


def dumps(value: BaseModel | Mapping[str, Any]) -> bytes:
    """Return a message as the bytes of JSON; what is None in a message is left out."""
    if isinstance(value, BaseModel):
        return value.__pydantic_serializer__.to_json(value, exclude_none=True)
    return to_json(value, inf_nan_mode="constants")


def loads(data: bytes) -> JsonObject:
    """Return the JSON object that the bytes hold.

    Raises:
        BackendUserError: they hold something else.
    """
    try:
        value = from_json(data, allow_inf_nan=True)
    except ValueError as error:
        raise BackendUserError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BackendUserError("the body is not a JSON object")
    return value


def parse(kind: type[M], value: Any) -> M:
    """Return a message from what :func:`loads` gave.

    Raises:
        BackendUserError: a field is missing or of the wrong type; says which, never its value.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BackendUserError(f"field {place!r}: {first['msg']}") from None


def tensor_to_wire(array: Array) -> JsonObject:
    """Return an array as a tensor of the wire: integers as int64, everything else as float32."""
    if array.dtype.kind in "iub":
        return {"data": array.reshape(-1).tolist(), "dtype": "int64", "shape": list(array.shape)}
    return {"data": array.reshape(-1).tolist(), "dtype": "float32", "shape": list(array.shape)}


def tensor_from_wire(tensor: TensorData, name: str = "tensor") -> Array:
    """Return the array of a tensor.

    Raises:
        BackendUserError: the data are not numbers of the dtype, or not as many as the shape says.
    """
    if tensor.dtype not in _DTYPES:
        raise BackendUserError(f"{name} has dtype {tensor.dtype[:16]!r}", hint="int64 and float32 are known")
    if tensor.sparse_crow_indices is not None or tensor.sparse_col_indices is not None:
        raise BackendUserError(f"{name} is sparse", hint="send dense tensors: one target per position")
    array = _numbers(tensor.data, name)
    if tensor.dtype == "int64" and len(array) and array.dtype.kind != "i":
        raise BackendUserError(f"{name} is of dtype int64 but its data are not integers")
    shape = tensor.shape if tensor.shape is not None else [len(tensor.data)]
    if any(size < 0 for size in shape) or int(np.prod(shape)) != len(tensor.data):
        raise BackendUserError(f"{name} has {len(tensor.data)} numbers, not those of its shape {shape}")
    with np.errstate(over="ignore"):
        return array.astype(_DTYPES[tensor.dtype]).reshape(shape)


def _numbers(data: Sequence[Any], name: str) -> Array:
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError, TypeError):
        raise BackendUserError(f"{name} does not hold a flat list of numbers") from None
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "if"):
        raise BackendUserError(f"{name} does not hold a flat list of numbers")
    return array


def datum_to_wire(datum: Datum) -> JsonObject:
    """Return a datum of tokens as the wire has it.

    Raises:
        BackendUserError: its input is not ``tokens``.
    """
    tokens = datum.inputs.get("tokens")
    if tokens is None:
        raise BackendUserError(f"datum {datum.key!r} has no tokens: the wire carries language models only")
    chunk = {"type": "encoded_text", "tokens": np.asarray(tokens).tolist()}
    inputs = {name: tensor_to_wire(np.asarray(array)) for name, array in datum.loss_inputs.items()}
    return {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": inputs}


def datum_from_wire(datum: WireDatum, key: str = "") -> Datum:
    """Return a datum from the wire.

    Raises:
        BackendUserError: a tensor is malformed, or the input is not text.
    """
    inputs = {name: tensor_from_wire(tensor, name) for name, tensor in datum.loss_fn_inputs.items()}
    return Datum({"tokens": tokens_from_wire(datum.model_input)}, inputs, key)


def tokens_from_wire(value: ModelInput) -> Array:
    """Return the token ids of a model input, int64 [T]; raises as :func:`token_ids` does."""
    try:
        return np.array(token_ids(value), dtype=np.int64)
    except OverflowError:
        raise BackendUserError("tokens are not integers of 64 bits") from None


def token_ids(value: ModelInput) -> list[int]:
    """Return the token ids of a model input, T of them.

    Raises:
        BackendUserError: a chunk is not encoded text, or holds something else than integers.
    """
    ids: list[Any] = []
    for chunk in value.chunks:
        if chunk.type != "encoded_text":
            raise BackendUserError(f"chunks of type {chunk.type[:32]!r} are not known", hint="send encoded_text")
        ids += chunk.tokens
    if not set(map(type, ids)) <= {int}:
        raise BackendUserError("tokens are not integers")
    return ids
