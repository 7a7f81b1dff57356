"""What all contract suites are made of: the suite, refusals, comparisons, and the checks of every adapter.

Knows no port and no test runner. Read next: ``crucible_kitchen.testing.contracts.training_client``.
"""

import json
import unittest
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeVar, overload

import numpy as np

from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.ports import Adapter
from crucible_kitchen.types import Array

__all__ = ["Case", "Refusal", "Suite", "close", "name", "refuses", "same_bits", "skip"]


class Case(Protocol):
    """What a check is given: an adapter and what is known about it."""

    @property
    def adapter(self) -> Adapter:
        """The adapter that is held to its contract."""
        ...


C = TypeVar("C", bound=Case)


class Suite(Sequence[Callable[[C], Awaitable[None]]]):
    """The checks of one port, in order; used as a decorator it adds a check.

    Args:
        port: the port's name.
    """

    def __init__(self, port: str) -> None:
        self.port = port
        self._checks: list[Callable[[C], Awaitable[None]]] = [
            public_options_are_json,
            it_says_whether_it_is_synthetic,
            closing_twice_is_harmless,
        ]

    def __call__(self, check: Callable[[C], Awaitable[None]]) -> Callable[[C], Awaitable[None]]:
        """Add a check."""
        self._checks.append(check)
        return check

    @overload
    def __getitem__(self, index: int) -> Callable[[C], Awaitable[None]]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Callable[[C], Awaitable[None]]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._checks[index]

    def __len__(self) -> int:
        return len(self._checks)


def name(check: Any) -> str:
    """Return a check's name, a sentence of behaviour, as an id for test runners."""
    return str(check.__name__)


def skip(reason: str) -> NoReturn:
    """Leave a check that does not apply to this adapter."""
    raise unittest.SkipTest(reason)


class Refusal:
    """A block that must raise one of ``errors``; afterwards ``error`` is what it raised."""

    error: BaseException

    def __init__(self, errors: tuple[type[BaseException], ...], what: str) -> None:
        self._errors = errors
        self._what = what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        expected = " or ".join(e.__name__ for e in self._errors)
        if error is None:
            raise AssertionError(f"{self._what} was not refused; expected {expected}")
        if isinstance(error, self._errors):
            self.error = error
            _is_well_made(error)
            return True
        if isinstance(error, Exception):
            raise AssertionError(f"{self._what} raised {type(error).__name__}: {error}; expected {expected}") from error
        return False


def refuses(*errors: type[BaseException], what: str) -> Refusal:
    """Expect the block to raise one of the errors; ``what`` says what should have been refused."""
    return Refusal(errors, what)


def _is_well_made(error: BaseException) -> None:
    if isinstance(error, CrucibleError):
        assert error.message.strip(), f"{type(error).__name__} has no message"
        assert len(str(error)) < 1000, f"{type(error).__name__} has a message of {len(str(error))} characters"


def same_bits(one: Sequence[Array], other: Sequence[Array], what: str) -> None:
    """Assert that two sequences of arrays are equal to the last bit."""
    assert len(one) == len(other), f"{what}: {len(one)} arrays against {len(other)}"
    for a, b in zip(one, other, strict=True):
        difference = float(np.max(np.abs(a - b), initial=0.0)) if a.shape == b.shape else float("nan")
        assert a.shape == b.shape, f"{what}: differ by up to {difference}"
        assert a.tobytes() == b.tobytes(), f"{what}: differ by up to {difference}"


def close(one: Sequence[Array], other: Sequence[Array], tolerance: float, what: str) -> None:
    """Assert that two sequences of arrays are equal up to an absolute tolerance."""
    assert len(one) == len(other), f"{what}: {len(one)} arrays against {len(other)}"
    for a, b in zip(one, other, strict=True):
        assert np.shape(a) == np.shape(b), f"{what}: shapes {np.shape(a)} and {np.shape(b)}"
        difference = float(np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0.0))
        assert difference <= tolerance, f"{what}: differ by up to {difference}, allowed {tolerance}"


async def public_options_are_json(case: Case) -> None:
    """``public_options`` goes into a manifest."""
    options = case.adapter.public_options()
    assert isinstance(options, dict), f"public_options gave {type(options).__name__}"
    assert json.loads(json.dumps(options)) == options, "public_options does not survive JSON"


async def it_says_whether_it_is_synthetic(case: Case) -> None:
    """``synthetic`` is a bool."""
    assert isinstance(case.adapter.synthetic, bool), "synthetic is not a bool"


async def closing_twice_is_harmless(case: Case) -> None:
    """``aclose`` is idempotent."""
    await case.adapter.aclose()
    await case.adapter.aclose()
