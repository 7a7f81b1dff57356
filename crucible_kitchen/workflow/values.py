"""What stages wrote, as JSON and back: JSON itself, pydantic models and frozen dataclasses.

A value is written without its type and read back as the type that its stage declares. It knows no stage and no store.
Read next: ``crucible_kitchen.workflow.records``.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

__all__ = ["digest", "from_json", "to_json"]


def to_json(value: Any) -> Any:
    """Return a value as JSON types; dataclasses and pydantic models become objects.

    Raises:
        TypeError: it holds something that JSON has no form for.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    raise TypeError(f"{type(value).__name__} is not JSON")


def from_json(data: Any, kind: Any) -> Any:
    """Return what :func:`to_json` was given, as the type that was declared for it (``Any``: the JSON itself).

    Raises:
        TypeError: it is not of this type.
    """
    try:
        return _adapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise TypeError(f"{'.'.join(map(str, first['loc'])) or 'the value'}: {first['msg']}") from None
    except PydanticSchemaGenerationError as error:
        raise TypeError(str(error).partition("\n")[0]) from None


@lru_cache(maxsize=1024)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def digest(data: Any) -> str:
    """Return the sha256 (hex) of JSON: equal values have equal digests everywhere."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
