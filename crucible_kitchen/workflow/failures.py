"""Failures: how anything that is raised becomes one error of our tree, with its place, its cause and its company.

Pure functions over exceptions; it knows no stage and no run. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import Iterator, Sequence
from traceback import format_tb, walk_tb
from types import TracebackType

import anyio

from crucible_kitchen.errors import CrucibleError, StageFailed
from crucible_kitchen.redaction import message_of

__all__ = ["as_ours", "cause_of", "first_of", "note", "reacts_to_cancel", "says", "trace", "traceback_of"]

_SHOWN = 300
_CAUSES = 6
_FRAMES = 12
"""How much of a traceback is kept: errors in the chain of causes, frames of each."""


def says(error: BaseException) -> str:
    """Return an error as one short line: its type and the beginning of its message, without data that it tells."""
    text = str(error) if isinstance(error, CrucibleError) else message_of(error)
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def trace(error: BaseException) -> list[str]:
    """Return where an error was raised, and where its causes were: types and places, no message and no value.

    Each error is a line with its type, followed by its innermost frames as ``  module:function:line``; causes follow.
    """
    lines: list[str] = []
    for at, way in _causes(error):
        frames = [
            f"  {frame.f_globals.get('__name__', '?')}:{frame.f_code.co_qualname}:{line}"
            for frame, line in walk_tb(way)
        ]
        lines += [type(at).__name__, *frames[-_FRAMES:]]
    return lines


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error and of its causes as Python shows it, but without data in the messages."""
    parts = []
    for at, way in _causes(error):
        notes = getattr(at, "__notes__", ()) if isinstance(at, CrucibleError) else ()
        parts.append("".join([*format_tb(way), "\n".join([says(at), *notes])]))
    return "\n\nbecause of:\n".join(parts)


def _causes(error: BaseException) -> Iterator[tuple[BaseException, TracebackType | None]]:
    """Yield an error and its causes, each with its traceback; of a group the member that is reported."""
    at: BaseException | None = error
    for _ in range(_CAUSES):
        if at is None:
            return
        group, at = at, first_of(at)
        yield at, at.__traceback__ or group.__traceback__
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def as_ours(error: BaseException, path: str) -> CrucibleError:
    """Return the error of our tree that a failure is, with its place.

    Of a group the first member is reported, one of our tree if there is one; the others stand in its notes, and the
    group itself stays reachable as ``__cause__`` (of a foreign error) or ``__context__`` (of one of ours).
    """
    first, rest = _leaves(error)
    if isinstance(first, CrucibleError):
        ours = first.at(path)
        if first is not error and first.__context__ is None:
            first.__context__ = error
    else:
        ours = StageFailed(says(first), where=path)
        ours.__cause__ = cause_of(error)
    note(ours, rest)
    return ours


def cause_of(error: BaseException) -> BaseException:
    """Return what stands as the cause of an error of ours: a group of one is that one, a larger group is kept."""
    first, rest = _leaves(error)
    return error if rest else first


def first_of(error: BaseException) -> BaseException:
    """Return the member of a group that is reported, or the error itself."""
    return _leaves(error)[0]


def note(error: BaseException, others: Sequence[BaseException]) -> None:
    """Attach what failed besides to the failure that is reported."""
    for other in others:
        line = f"also failed: {says(other)}"
        if other is not error and line not in getattr(error, "__notes__", ()):
            error.add_note(line)


def reacts_to_cancel(error: BaseException) -> bool:
    """Return whether an error was raised while a cancellation was on its way, by a ``finally`` for instance."""
    cancelled, at = anyio.get_cancelled_exc_class(), first_of(error).__context__
    while at is not None and not isinstance(at, cancelled):
        at = at.__context__
    return at is not None


def _leaves(error: BaseException) -> tuple[BaseException, list[BaseException]]:
    """Take a group apart: the member to report, and the others."""
    if not isinstance(error, BaseExceptionGroup):
        return error, []
    flat: list[BaseException] = []
    for member in error.exceptions:
        first, rest = _leaves(member)
        flat += [first, *rest]
    flat.sort(key=lambda e: not isinstance(e, CrucibleError))
    return flat[0], flat[1:]
