"""The commands put together, and the one place where the command line begins and ends.

Read next: ``crucible_kitchen.cli.running``.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from crucible_kitchen import __version__
from crucible_kitchen.cli import (
    catalogue,
    comparing,
    doctor,
    listing,
    models,
    reading,
    rehearsing,
    running,
    sample,
    serving,
    verifying,
)
from crucible_kitchen.cli.console import (
    CANCELLED,
    FAILED,
    USAGE,
    answer,
    answer_json,
    error_lines,
    failure_json,
    forget_output,
    say,
)
from crucible_kitchen.cli.options import JsonOption

__all__ = ["app", "call"]

PROGRAM = "crucible-kitchen"

app = typer.Typer(
    name=PROGRAM,
    help="Post-training orchestration: checked, durable async workflows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        answer(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Post-training orchestration: checked, durable async workflows."""


def version(as_json: JsonOption = False) -> None:
    """Show the versions of everything that results depend on."""
    from crucible_kitchen.manifest import package_versions

    found = package_versions()
    if as_json:
        answer_json(found)
        return
    for name, number in found.items():
        answer(f"{name} {number}")


for _command in (
    running.run,
    running.resume,
    running.validate,
    rehearsing.rehearse,
    reading.show,
    reading.events,
    comparing.compare,
    verifying.verify,
    catalogue.describe,
    catalogue.workflows,
    catalogue.recipes,
    catalogue.adapters,
    catalogue.environments,
    sample.sample,
    serving.train_server,
    doctor.doctor,
    version,
):
    app.command()(_command)
app.add_typer(listing.runs, name="runs")
app.add_typer(models.models, name="models")

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def call(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; nothing is raised but what ends the interpreter."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given, prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        return _misused(error, as_json="--json" in given)
    except typer.Abort:
        return CANCELLED
    except KeyboardInterrupt:
        say("cancelled")
        return CANCELLED
    except BrokenPipeError:
        return forget_output()
    except SystemExit as end:  # the parser's own way to end when its reader went away
        return end.code if isinstance(end.code, int) else FAILED


def _misused(error: Exception, *, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        say(message)
        return USAGE
    facts = {"code": "usage", "message": message, "where": None, "hint": f"{path} --help"}
    for line in error_lines(facts):
        say(line)
    if as_json:
        answer_json(failure_json(facts))
    return USAGE
