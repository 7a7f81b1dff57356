"""Which declared type may stand where, what can be recorded, and that the public types survive the decorator."""

import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NewType, Optional, Protocol, TypedDict, TypeVar, Union

import numpy as np
import pytest
from pydantic import BaseModel

from crucible_kitchen.ports import TrainingSession
from crucible_kitchen.types import BlobRef
from crucible_kitchen.workflow.nodes import Positioned
from crucible_kitchen.workflow.typing import fits, is_optional, recordable, type_name

T = TypeVar("T")
UserId = NewType("UserId", int)


class Base: ...


class Child(Base): ...


class Box(Generic[T]): ...


class SubBox(Box[T]): ...


class Reader(Protocol):
    def read(self, n: int) -> bytes: ...


class LongReader(Reader, Protocol):
    name: str

    def __len__(self) -> int: ...


class File:
    def __init__(self) -> None:
        self.name = "set in the constructor"

    def read(self, n: int) -> bytes:
        return b""

    def __len__(self) -> int:
        return 0


class Short:
    def read(self, n: int) -> bytes:
        return b""


class Anything:
    def __getattr__(self, name: str) -> Any: ...


@pytest.mark.parametrize(
    ("have", "want", "verdict"),
    [
        (int, int, True),
        (int, str, False),
        (Child, Base, True),
        (Base, Child, False),
        (bool, int, True),
        (int, float, True),
        (bool, float, True),
        (float, int, False),
        (Any, int, True),
        (int, Any, True),
        (int, object, True),
        (T, int, True),
        (int, int | None, True),
        (int, Optional[float], True),  # noqa: UP045 - both spellings are met
        (int | None, int, False),
        (None, int | None, True),
        (type(None), None, True),
        (int | str, int | str | None, True),
        (Union[int, str], int, False),  # noqa: UP007 - both spellings are met
        (Literal["a"], str, True),
        (Literal["a"], int, False),
        (Literal["a"], Literal["a", "b"], True),
        (Literal["c"], Literal["a", "b"], False),
        (str, Literal["a"], True),
        (list[int], list[int], True),
        (list[int], list[str], False),
        (list[int], list[float], True),
        (list[int], list, True),
        (list, list[int], True),
        (list[int], Sequence[int], True),
        (list[int], Iterable[str], True),  # arguments of unequal generics are not judged
        (tuple[int, ...], tuple[int, int], True),
        (dict[str, int], Mapping[str, int], True),
        (dict[str, int], dict[str, str], False),
        (list[int], dict[str, int], False),
        (Box[int], Box[str], False),
        (SubBox[int], Box[int], True),
        (Box[int], SubBox[int], False),
        (Annotated[int, "unit"], int, True),
        (int, Annotated[str, "unit"], False),
        (UserId, str, True),
        (Callable[[int], str], Callable[[int], int], False),
        (Callable[[str], int], Callable[[int], int], True),
        (File, Reader, True),
        (File, LongReader, True),  # attributes are not judged, methods are
        (Short, LongReader, False),
        (Short, Reader, True),
        (Base, Reader, False),
        (Anything, LongReader, True),
        (LongReader, Reader, True),
        (Reader, LongReader, False),
        (dict, Reader, False),
        (int, Awaitable[int], False),
        (list[int], Positioned[int], False),
        (TrainingSession, TrainingSession, True),
        (Base, TrainingSession, False),
    ],
)
def test_one_type_fits_another(have: Any, want: Any, verdict: bool) -> None:
    assert fits(have, want) is verdict


@dataclass(frozen=True)
class Frozen:
    a: int


@dataclass
class Mutable:
    a: int


class Model(BaseModel):
    a: int


class Typed(TypedDict):
    a: int


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        *[(k, True) for k in (None, bool, int, float, str, Any, BlobRef, Frozen, Model, Typed, T)],
        *[(k, True) for k in (list[int], list, dict[str, Any], tuple[Frozen, ...], Sequence[str], Mapping[str, int])],
        *[
            (k, True)
            for k in (int | None, Frozen | Model, Literal["a"], Annotated[int, "unit"], dict[str, list[Model]])
        ],
        *[(k, False) for k in (Mutable, object, set[int], bytes, np.ndarray, File, list[Mutable], int | File)],
        *[(k, False) for k in (TrainingSession, Callable[[], int], dict[str, File], Iterable[int], Path)],
    ],
)
def test_a_record_is_json_a_model_a_frozen_dataclass_or_made_of_them(kind: Any, verdict: bool) -> None:
    assert recordable(kind) is verdict


def test_types_are_named_as_people_write_them() -> None:
    kinds = [int, None, Any, int | None, Optional[int], list[int], Literal["a"], Frozen]  # noqa: UP045
    names = ["int", "None", "Any", "int | None", "Optional[int]", "list[int]", "Literal['a']", "Frozen"]
    assert [type_name(k) for k in kinds] == names
    assert [is_optional(k) for k in kinds] == [False, False, False, True, True, False, False, False]


def test_a_type_checker_sees_the_types_of_stages_and_resources() -> None:
    """``tests/typing/api.py`` is never run: mypy reads it, and every wrong line in it must be reported."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "tests/typing/api.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
