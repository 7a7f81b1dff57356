"""Prefect with its own local server: tasks whose results are kept by their inputs; all of it in the directory."""

import asyncio
import os
import sys
import time
from pathlib import Path

HOME = Path(sys.argv[sys.argv.index("--directory") + 1]).absolute()
os.environ |= {
    "PREFECT_HOME": str(HOME / "prefect"),
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(HOME / "results"),
}

from _work import main, pause, through  # noqa: E402
from prefect import flow, task  # noqa: E402
from prefect.cache_policies import INPUTS  # noqa: E402


@task
async def nothing(step: int) -> int:
    return step


@task(persist_result=True, cache_policy=INPUTS)
async def leave(step: int, directory: str) -> int:
    pause()
    return through(Path(directory), step)


@flow
async def chain(steps: int) -> int:
    for step in range(steps):
        await nothing(step)
    return steps


@flow(persist_result=False)
async def forty(steps: int, directory: str) -> int:
    for step in range(steps):
        await leave(step, directory)
    return steps


def cost(steps: int, _directory: Path) -> list[tuple[str, float]]:
    async def timed() -> float:
        await chain(5)
        began = time.perf_counter()
        await chain(steps)
        return time.perf_counter() - began

    return [("its server on SQLite, tasks one by one", asyncio.run(timed()) / steps)]


def run(steps: int, directory: Path, _how: str) -> None:
    asyncio.run(forty(steps, str(directory.absolute())))


if __name__ == "__main__":
    main(cost, run)
