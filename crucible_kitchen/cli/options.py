"""The options that several commands share. Read next: ``crucible_kitchen.cli.app``."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = [
    "AdapterOption",
    "ConfigOption",
    "DebugOption",
    "HomeOption",
    "JsonOption",
    "JsonlOption",
    "MetricsHostOption",
    "MetricsPortOption",
    "QuietOption",
    "TargetArgument",
    "TensorboardOption",
    "Values",
]

TargetArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="WORKFLOW|RECIPE",
        help="A workflow or recipe: its name, `package.module:attribute` or `path/to/file.py:attribute`.",
        show_default=False,
    ),
]
Values: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Config values, for instance `model=tiny dataset=sums epochs=3`. `null` is no value; lists and objects "
        "are JSON; `a.b=1` sets a key of an object.",
        show_default=False,
    ),
]
ConfigOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Config values from a .toml or .json file; KEY=VALUE wins over it."),
]
AdapterOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="PORT=NAME[,KEY=VALUE...]",
        help="Use this adapter for a port, once per port. `none` is no adapter. Give secrets as `env:NAME`.",
    ),
]
HomeOption: TypeAlias = Annotated[
    Path,
    typer.Option("--home", metavar="DIR", envvar="CRUCIBLE_HOME", help="Where runs, models and weights are kept."),
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON value as the last line of standard output.")
]
DebugOption: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

MetricsPortOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--metrics-port", metavar="N", min=0, max=65535, help="Serve Prometheus metrics there; 0 takes a free port."
    ),
]
MetricsHostOption: TypeAlias = Annotated[
    str, typer.Option("--metrics-host", metavar="HOST", help="The interface that metrics are served on.")
]
JsonlOption: TypeAlias = Annotated[
    Path | None, typer.Option("--jsonl", metavar="FILE", help="Append every event to a file.")
]
TensorboardOption: TypeAlias = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write curves for TensorBoard.")
]
QuietOption: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]

DEFAULT_HOME = Path(".crucible")
