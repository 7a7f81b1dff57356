"""Options of environments, which arrive as text, and what becomes of a worker's failure.

Read next: ``math_problems.py``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from crucible_kitchen.errors import ConfigError, EnvironmentFault, EnvironmentTimeout, WorkerError, WorkerRaised

__all__ = ["amount", "faults_of", "value", "whole"]


def whole(env: str, name: str, text: str, least: int = 1) -> int:
    """Return an option that is a whole number.

    Raises:
        ConfigError: it is none, or less than ``least``.
    """
    if not str(text).isdecimal() or int(text) < least:
        raise ConfigError(f"the environment {env!r}: {name}={text!r} is not a whole number of {least} or more")
    return int(text)


def amount(env: str, name: str, text: str) -> float:
    """Return an option that is a positive number.

    Raises:
        ConfigError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"the environment {env!r}: {name}={text!r} is not a positive number")
    return number


def value(text: str) -> bool | int | float | str:
    """Return what a text looks like: a boolean, a finite number, or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@contextmanager
def faults_of(what: str) -> Iterator[None]:
    """Say of a worker's failure that it is the environment's; the text of a foreign error may quote data and stays out.

    Raises:
        EnvironmentTimeout: the worker took too long.
        EnvironmentFault: it raised or died.
    """
    try:
        yield
    except TimeoutError as error:
        raise EnvironmentTimeout(f"{what} took too long and was killed") from error
    except WorkerRaised as error:
        raise EnvironmentFault(f"{what} raised {error.error}") from error
    except WorkerError as error:
        raise EnvironmentFault(f"{what} ended its process: {error.message}") from error
