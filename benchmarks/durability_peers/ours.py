"""This project's own, asked the same: stages of a workflow whose outputs are records, in each mode of durability."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
from _work import main, pause, through

from crucible_kitchen import Kitchen, Loop, Parallel, RunConfig, Workflow, stage
from crucible_kitchen.store import MemoryRunStore
from crucible_kitchen.workers import run_sync

LANES = 64


class Steps(RunConfig):
    """How many, and where they leave their lines."""

    steps: int = 40
    """How many steps there are."""

    place: str = ""
    """The directory of the lines."""


@stage(writes="last")
async def nothing(step: int) -> int:
    return step


@stage(writes="last")
async def leave(step: int, config: Steps) -> int:
    await run_sync(pause)
    return through(Path(config.place), step)


def count(config: Steps) -> range:
    return range(config.steps)


def lanes(config: Steps) -> range:
    return range(config.steps // LANES)


forty = Workflow("forty", Loop("step", count, leave), config=Steps)
chain = Workflow("chain", Loop("step", count, nothing), config=Steps)
wide = Workflow(
    "wide",
    Parallel(*[[Workflow(f"lane{i}", Loop("step", lanes, nothing), config=Steps)] for i in range(LANES)]),
    config=Steps,
)


async def timed(
    workflow: Workflow, steps: int, directory: Path, durability: str, store: MemoryRunStore | None
) -> float:
    async with Kitchen(home=directory, store=store) as kitchen:
        await kitchen.run(workflow, {"steps": LANES, "durability": durability})
        began = time.perf_counter()
        await kitchen.run(workflow, {"steps": steps, "durability": durability})
        return time.perf_counter() - began


def cost(steps: int, directory: Path) -> list[tuple[str, float]]:
    cases: list[tuple[str, Workflow, int, str, Callable[[], Any]]] = [
        ("in memory", chain, steps, "behind", MemoryRunStore),
        ("SQLite, `behind`", chain, steps, "behind", lambda: None),
        ("SQLite, `sync`, one lane", chain, steps, "sync", lambda: None),
        ("SQLite, `sync`, 64 lanes", wide, steps * LANES // 8, "sync", lambda: None),
    ]
    rows = []
    for number, (how, workflow, many, durability, store) in enumerate(cases):
        home = directory / str(number)
        rows.append((how, anyio.run(timed, workflow, many, home, durability, store()) / many))
    return rows


def run(steps: int, directory: Path, how: str) -> None:
    async def begun() -> None:
        async with Kitchen(home=directory / "home") as kitchen:
            known = await kitchen.store.runs(1)
            config = {"steps": steps, "place": str(directory), "durability": how or "sync"}
            if not known:
                await kitchen.run(forty, config)
            elif known[0].status != "completed":
                await kitchen.resume(known[0].run_id, target=forty)

    anyio.run(begun)


if __name__ == "__main__":
    main(cost, run)
