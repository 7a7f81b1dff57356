"""DBOS on SQLite: a workflow of steps, each with its output as a row. It recovers what was pending when it launches."""

import time
from pathlib import Path

from _work import main, pause, through
from dbos import DBOS, SetWorkflowID

AT = Path()


def launched(directory: Path) -> None:
    DBOS(
        config={
            "name": "bench",
            "system_database_url": f"sqlite:///{directory}/dbos.db",
            "application_version": "1",
            "executor_id": "bench",
            "log_level": "ERROR",
        }
    )
    DBOS.launch()


@DBOS.step()
def nothing(step: int) -> int:
    return step


@DBOS.step()
def leave(step: int) -> int:
    pause()
    return through(AT, step)


@DBOS.workflow()
def chain(steps: int) -> int:
    for step in range(steps):
        nothing(step)
    return steps


@DBOS.workflow()
def forty(steps: int) -> int:
    for step in range(steps):
        leave(step)
    return steps


def cost(steps: int, directory: Path) -> list[tuple[str, float]]:
    launched(directory)
    chain(10)
    began = time.perf_counter()
    chain(steps)
    took = time.perf_counter() - began
    DBOS.destroy()
    return [("SQLite, a row a step", took / steps)]


def run(steps: int, directory: Path, _how: str) -> None:
    global AT
    AT = directory
    launched(directory)
    if DBOS.get_workflow_status("forty") is None:
        with SetWorkflowID("forty"):
            DBOS.start_workflow(forty, steps)
    DBOS.retrieve_workflow("forty").get_result()
    DBOS.destroy()


if __name__ == "__main__":
    main(cost, run)
