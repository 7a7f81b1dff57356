"""Whether one declared type can stand where another is asked for, and whether a value of it can be recorded.

Judges classes, unions, ``Any``, arguments of equal generics and protocols; what cannot be judged passes, because a
false alarm would cost more trust than a missed one. Read next: ``crucible_kitchen.workflow.check``.
"""

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, is_typeddict

from pydantic import BaseModel

__all__ = ["fits", "is_optional", "recordable", "type_name"]

_SCALARS = (bool, int, float, str, type(None))
_OF_EVERY_PROTOCOL = frozenset(dir(Protocol))
_PROMOTIONS = {(int, float), (bool, float)}


def type_name(kind: Any) -> str:
    """Return a type as a person would write it."""
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("NoneType", "None")


def _plain(kind: Any) -> Any:
    """Take off what does not matter to fitting: Annotated and None's alias."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return type(None) if kind is None else kind


def _members(kind: Any) -> tuple[Any, ...] | None:
    """Return the members of a union, or None for anything else."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else None


def is_optional(kind: Any) -> bool:
    """Return whether None is among the type's values."""
    members = _members(_plain(kind))
    return members is not None and type(None) in members


def fits(have: Any, want: Any) -> bool:
    """Return whether a value declared as ``have`` may be read as ``want``; unjudgeable pairs pass."""
    have, want = _plain(have), _plain(want)
    if Any in (have, want) or have == want or want is object or isinstance(have, TypeVar) or isinstance(want, TypeVar):
        return True
    if (options := _members(have)) is not None:
        return all(fits(option, want) for option in options)
    if (options := _members(want)) is not None:
        return any(fits(have, option) for option in options)
    if get_origin(have) is Literal:
        return all(
            fits(type(v), want) if get_origin(want) is not Literal else v in get_args(want) for v in get_args(have)
        )
    if get_origin(want) is Literal:
        return True
    return _classes_fit(have, want)


def _classes_fit(have: Any, want: Any) -> bool:
    have_class, want_class = get_origin(have) or have, get_origin(want) or want
    if not (isinstance(have_class, type) and isinstance(want_class, type)):
        return True
    if getattr(want_class, "_is_protocol", False):
        return want_class in have_class.__mro__ or _has_methods(have_class, want_class)
    if (have_class, want_class) in _PROMOTIONS:
        return True
    try:
        if not issubclass(have_class, want_class):
            return False
    except TypeError:
        return True
    have_args, want_args = get_args(have), get_args(want)
    if have_class is want_class and len(have_args) == len(want_args):
        return all(fits(h, w) for h, w in zip(have_args, want_args, strict=True))
    return True


def _has_methods(have: type, protocol: type) -> bool:
    """Return whether a class has every method a protocol asks for.

    Attributes and properties are not judged: an instance may get them in its constructor.
    """
    if hasattr(have, "__getattr__"):
        return True
    asked = {
        name
        for base in protocol.__mro__
        if getattr(base, "_is_protocol", False) and base is not Protocol
        for name, value in vars(base).items()
        if inspect.isfunction(value) and (name not in vars(object) and name not in _OF_EVERY_PROTOCOL)
    }
    return all(hasattr(have, name) for name in asked)


def recordable(kind: Any) -> bool:
    """Return whether a value of this type can stand in the run's record: JSON, pydantic, frozen dataclass.

    Live things (sessions, files, pools) cannot: a resource yields them and they are opened again on resume.
    """
    kind = _plain(kind)
    if kind is Any or isinstance(kind, TypeVar) or kind in _SCALARS:
        return True
    if (options := _members(kind)) is not None:
        return all(recordable(option) for option in options)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return True
    base = origin or kind
    if not isinstance(base, type):
        return True
    if issubclass(base, (list, tuple, dict)) or base in (Sequence, Mapping):
        return all(recordable(a) for a in args if a is not Ellipsis)
    if dataclasses.is_dataclass(base):
        return bool(base.__dataclass_params__.frozen)  # type: ignore[attr-defined]
    return issubclass(base, BaseModel) or is_typeddict(base)
