"""The command line: ``crucible-kitchen``. One file per group of commands.

It knows the kitchen and nothing below it that the kitchen can be asked for; everything heavy is imported inside the
command that needs it, so that ``--help`` is quick. Read next: ``crucible_kitchen.cli.app``.
"""

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; unset: those of this process.
    """
    from crucible_kitchen.cli.app import call

    return call(arguments)
