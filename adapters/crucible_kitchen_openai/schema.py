"""JSON Schema: is this a schema, and does a value fulfil it. References lead nowhere outside the schema.

Knows no service. Read next: ``crucible_kitchen_openai.chat``.
"""

from collections.abc import Mapping
from typing import Any

from crucible_kitchen.errors import BackendUserError, MissingExtra

__all__ = ["check_schema", "fulfils"]


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse what is not a schema, before it is sent.

    Raises:
        BackendUserError: it is not a JSON Schema.
        MissingExtra: the package that reads schemas is not installed.
    """
    exceptions = _jsonschema().exceptions
    try:
        _validator(schema).check_schema(dict(schema))
    except exceptions.SchemaError as error:
        raise BackendUserError(f"this is not a JSON Schema, at {error.json_path}") from error


def fulfils(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value fulfils a schema.

    Raises:
        BackendUserError: the schema refers to something that is not in it.
    """
    from referencing.exceptions import Unresolvable

    try:
        return bool(_validator(schema).is_valid(value))
    except Unresolvable as error:
        raise BackendUserError("the schema refers to something that is not in it") from error


def _validator(schema: Mapping[str, Any]) -> Any:
    from referencing import Registry

    module = _jsonschema()
    kind = module.validators.validator_for(dict(schema), default=module.Draft202012Validator)
    return kind(dict(schema), registry=Registry())  # an empty registry: nothing is fetched


def _jsonschema() -> Any:
    try:
        import jsonschema  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("jsonschema", "judges") from error
    return jsonschema
