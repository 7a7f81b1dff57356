"""Flyte, local: tasks whose outputs are cached by their inputs."""

import os
import time
from pathlib import Path

import flyte
from _work import main, pause, through

env = flyte.TaskEnvironment(name="bench", cache="auto")
plain = flyte.TaskEnvironment(name="plain")


@plain.task
async def nothing(step: int) -> int:
    return step


@plain.task
async def chain(steps: int) -> int:
    for step in range(steps):
        await nothing(step)
    return steps


@env.task
async def leave(step: int, directory: str) -> int:
    pause()
    return through(Path(directory), step)


@plain.task
async def forty(steps: int, directory: str) -> int:
    for step in range(steps):
        await leave(step, directory)
    return steps


def at_home(directory: Path) -> None:
    os.environ["HOME"] = str(directory.absolute())  # its cache is below the home directory
    os.chdir(directory)
    flyte.init(root_dir=Path(__file__).parent)


def cost(steps: int, directory: Path) -> list[tuple[str, float]]:
    at_home(directory)
    flyte.with_runcontext(mode="local").run(chain, 5)
    began = time.perf_counter()
    flyte.with_runcontext(mode="local").run(chain, steps)
    return [("local, nothing kept", (time.perf_counter() - began) / steps)]


def run(steps: int, directory: Path, _how: str) -> None:
    at_home(directory)
    flyte.with_runcontext(mode="local").run(forty, steps, str(directory.absolute()))


if __name__ == "__main__":
    main(cost, run)
