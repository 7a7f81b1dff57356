"""What every engine is given to do: a step that costs nothing, and one that leaves a line when its body is through.

Standard library only, because each peer has a virtual environment of its own. ``cost`` prints rows of microseconds a
step as JSON; ``run`` runs the forty-step run in a directory, or goes on with it, until it is complete.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["PAUSE", "main", "pause", "through"]

PAUSE = 0.01
"""Seconds that a step of the forty-step run takes before its body is through."""


def pause() -> None:
    """Do a step's work."""
    time.sleep(PAUSE)


def through(directory: Path, step: int) -> int:
    """Leave the line that says that the body of a step is through, in one write that a kill cannot tear."""
    handle = os.open(directory / "through.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{step}\n".encode())
    os.close(handle)
    return step


def main(
    cost: Callable[[int, Path], list[tuple[str, float]]], run: Callable[[int, Path, str], None] | None = None
) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["cost", "run"])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--how", default="")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    if args.what == "cost":
        print(json.dumps([[how, seconds * 1e6] for how, seconds in cost(args.steps, args.directory)]))
    else:
        assert run is not None, "this engine has no run here"
        run(args.steps, args.directory, args.how)
