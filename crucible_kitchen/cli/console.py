"""What the command line writes, where, and with which exit code.

Answers go to standard output (``--json``: one JSON value as its last line), everything else to standard error. It
knows no command. Read next: ``crucible_kitchen.cli.app``.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec

import typer

from crucible_kitchen.cli.options import DebugOption
from crucible_kitchen.errors import (
    AdapterError,
    ConfigError,
    CrucibleError,
    NotFoundError,
    RunChanged,
    RunNotReproducible,
    WorkflowError,
)
from crucible_kitchen.redaction import message_of, redacted

__all__ = [
    "BAD_USAGE",
    "CANCELLED",
    "COMPLETED",
    "FAILED",
    "PAUSED",
    "USAGE",
    "answer",
    "answer_json",
    "block",
    "error_facts",
    "error_lines",
    "failure_json",
    "forget_output",
    "known_error",
    "plain",
    "report",
    "reporting",
    "say",
    "table",
]

P = ParamSpec("P")

COMPLETED = 0
FAILED = 1
USAGE = 2
PAUSED = 75
CANCELLED = 130
PIPE = 141
"""What a shell reports for a program whose reader went away."""

BAD_USAGE = (ConfigError, WorkflowError, AdapterError, NotFoundError, RunChanged, RunNotReproducible)
"""What is wrong with what was asked, when it is raised before anything ran."""


def say(text: str = "") -> None:
    """Write a line for people to standard error."""
    typer.echo(text, err=True)


def answer(text: str = "") -> None:
    """Write a line of the answer to standard output."""
    typer.echo(text)


def answer_json(value: Any) -> None:
    """Write the answer as one line of strict JSON; NaN and infinity, which JSON has no word for, become null."""
    answer(json.dumps(plain(value), allow_nan=False))


def plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it; what it cannot hold becomes text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows as a table: as wide as the terminal, and never folded where there is none (``| grep``)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    wide = None if sys.stdout.isatty() else 4096
    console = Console(file=sys.stdout, width=wide, markup=False, highlight=False, emoji=False)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column.upper(), overflow="fold")
    for row in rows:
        shown.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console.print(shown)


def block(title: str, pairs: Iterable[tuple[str, Any]]) -> None:
    """Write a title and below it names with values, in two columns; nothing if there is none."""
    shown = [(name, _in_words(value)) for name, value in pairs]
    if not shown:
        return
    answer(title)
    width = max(len(name) for name, _ in shown)
    for name, text in shown:
        answer(f"  {name:<{width}}  {text}")


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)


def error_facts(error: CrucibleError) -> dict[str, Any]:
    """Return an error as the store and ``--json`` hold it."""
    hint = redacted(error.hint) if error.hint else None
    return {"code": error.code, "message": redacted(error.message), "where": error.where, "hint": hint}


def error_lines(facts: Mapping[str, Any], problems: Sequence[str] = ()) -> list[str]:
    """Return an error as people read it: what and where in one line, then what to do; several problems, one a line."""
    message = f"{facts['where']}: {facts['message']}" if facts["where"] else facts["message"]
    if len(problems) > 1:
        message = message.partition(": ")[0] + ":"
    lines = [f"error [{facts['code']}] {_one_line(message)}"]
    if len(problems) > 1:
        lines += [f"  - {_one_line(problem)}" for problem in problems]
    if facts["hint"]:
        lines.append(f"hint: {_one_line(facts['hint'])}")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def failure_json(facts: Mapping[str, Any], *, run_id: str | None = None, status: str = "failed") -> dict[str, Any]:
    """Return a failure as ``--json`` prints it."""
    return {"run_id": run_id, "status": status, "error": dict(facts)}


def report(error: CrucibleError, *, debug: bool) -> None:
    """Tell people of an error; with ``debug`` also where it was raised."""
    if debug:
        from crucible_kitchen.workflow.failures import traceback_of

        say(redacted(f"Traceback, without data:\n{traceback_of(error)}"))
    for line in error_lines(error_facts(error), getattr(error, "problems", ())):
        say(line)


def reporting(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: whatever it raises becomes one clear error and an exit code, never a traceback.

    The command gets an option ``--debug``, which shows the traceback after all, unless it has one itself; its own
    ``as_json`` says whether the error is also told as JSON.
    """
    signature = inspect.signature(command)
    own_debug = "debug" in signature.parameters

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        debug = kwargs["debug"] if own_debug else kwargs.pop("debug", False)
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            raise typer.Exit(forget_output()) from None
        except Exception as error:  # noqa: BLE001 - the edge: everything ends as one line and an exit code
            known = known_error(error)
            report(known, debug=debug)
            if kwargs.get("as_json"):
                answer_json(failure_json(error_facts(known)))
            raise typer.Exit(USAGE if isinstance(known, BAD_USAGE) else FAILED) from None

    if not own_debug:
        option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption)
        # What the parser looks at to know a command's options.
        wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {**command.__annotations__, "debug": DebugOption}
    return wrapped


def known_error(error: BaseException) -> CrucibleError:
    """Return an error as one of the tree: of a group its first one, and one that nobody foresaw with its kind."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, CrucibleError):
        return error
    told = CrucibleError(
        f"{type(error).__name__}: {message_of(error)}",
        hint="run it again with --debug to see where it happened",
    )
    told.__cause__ = error
    return told


def forget_output() -> int:
    """Send what is still to be written nowhere, because the reader of standard output went away; return the code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return PIPE
