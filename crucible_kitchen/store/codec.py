"""Records to text and back: the JSON that the run store keeps.

It knows the events' fields and no database. Read next: ``crucible_kitchen.store.schema``.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter
from pydantic_core import SchemaSerializer, to_json
from pydantic_core.core_schema import CoreConfig, any_schema

from crucible_kitchen.errors import StoreError
from crucible_kitchen.events import Event, EventRecord, event_from_json
from crucible_kitchen.store.records import Checkpoint
from crucible_kitchen.types import Json

__all__ = ["decode_event", "encode_event", "encode_json", "sealed", "through_json"]


def _plain(value: object) -> Any:
    """Give what JSON has no form for a form; a record is never lost because of one odd value."""
    if isinstance(value, Mapping):
        return dict(value)
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else str(value)


def encode_json(value: object) -> str:
    """Write a value as compact JSON.

    pydantic's serializer takes a third of the time of the standard library's, which matters because the writer's
    thread shares the interpreter with the run. NaN and infinity stay what they are.
    """
    try:
        return to_json(value, inf_nan_mode="constants", fallback=_plain).decode()
    except (ValueError, UnicodeError):  # text that is not Unicode, such as half of a surrogate pair
        return json.dumps(value, separators=(",", ":"), default=_plain)


def encode_event(event: Event) -> str:
    """Write an event's fields as compact JSON, by a serializer made once for its kind: half the time again."""
    try:
        kind: Any = type(event)
        return _serializer(kind).to_json(event, warnings=False, fallback=_plain).decode()
    except (ValueError, UnicodeError):
        return encode_json({field.name: getattr(event, field.name) for field in fields(event)})


@cache
def _serializer(kind: type[Event]) -> SchemaSerializer:
    """Return what writes one kind of event; a field of another type than declared is written as what it is."""
    constants = CoreConfig(ser_json_inf_nan="constants")
    try:
        schema: Any = {**TypeAdapter(kind).core_schema, "config": constants}
    except PydanticSchemaGenerationError:  # an event of somebody else's, with fields that pydantic does not know
        schema = any_schema()
    return SchemaSerializer(schema, constants)


def through_json(value: Json) -> Json:
    """Return what is left of a value after a journey through JSON: a deep copy without tuples and foreign types."""
    return json.loads(encode_json(value))


def sealed(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as JSON keeps it, with its digest."""
    kept = replace(
        checkpoint, data=through_json(checkpoint.data), states=through_json(checkpoint.states), damaged=False
    )
    return replace(kept, sha256=kept.digest())


def decode_event(run_id: str, seq: int, time: float, name: str, data: str) -> EventRecord:
    """Rebuild a record from its columns.

    Raises:
        StoreError: the event is of a kind that this version does not know.
    """
    try:
        return EventRecord(run_id, seq, time, event_from_json(name, json.loads(data)))
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"record {seq} of run {run_id!r} is an event {name!r} that this version cannot read",
            hint="upgrade crucible-kitchen",
        ) from error
