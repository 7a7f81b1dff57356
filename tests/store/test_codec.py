"""An event's serializer is made from its declared types, and writes whatever its fields hold."""

import json
import math
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.events import EVENTS, Event
from crucible_kitchen.store.codec import encode_event, encode_json

ODD: list[Any] = [
    1.5, math.nan, math.inf, -math.inf, 3, None, "é", "half a pair \ud800", np.float32(1.5), np.int64(4),
    {"a": math.nan, "b": np.float32(2.0)}, (1, 2), [math.inf], {1: "one"}, True,
]  # fmt: skip


@pytest.mark.parametrize("kind", EVENTS.values(), ids=list(EVENTS))
@pytest.mark.parametrize("first", range(len(ODD)))
def test_every_event_is_written_as_its_fields_are_by_themselves_whatever_they_hold(
    kind: type[Event], first: int
) -> None:
    names = [field.name for field in fields(kind)]
    values = dict(zip(names, islice(ODD * (1 + len(names)), first, None), strict=False))
    written, by_itself = encode_event(kind(**values)), encode_json(values)
    assert _comparable(json.loads(written)) == _comparable(json.loads(by_itself))


def test_an_event_with_fields_of_a_foreign_class_is_written_too() -> None:
    class Foreign:
        def __str__(self) -> str:
            return "foreign"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class OfSomebodyElse(Event):
        name = "somebody.elses"
        what: Foreign

    del EVENTS["somebody.elses"]
    assert encode_event(OfSomebodyElse(what=Foreign())) == '{"what":"foreign"}'


def _comparable(value: Any) -> str:
    """Return text that is equal for equal values, NaN among them; a yes is the number 1 where one is declared."""
    return json.dumps(value, sort_keys=True).replace("true", "1.0").replace(".0", "")
