"""What going on costs: a checkpoint every ten steps, ten thousand stages that are done, a cold start of a killed run.

The load is the built-in `tiny` model on `sums`. Training with and without checkpoints takes turns in one process, and
the time is from the first optimizer step to the last. A killed run is one whose stage fails after its checkpoint; the
process that goes on with it has imported everything and opened nothing.

    python benchmarks/bench_resume.py [--steps 60] [--repetitions 5] [--stages 10000]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
from _table import machine, print_table

from crucible_kitchen import Kitchen, Loop, Workflow, stage
from crucible_kitchen.errors import CrucibleError, TrainingError
from crucible_kitchen.events import TrainingStep
from crucible_kitchen.workflows.supervised import supervised

TINY = {"model": "tiny", "dataset": "sums", "eval_size": 8, "stall_after": 0}


def config(steps: int, **values: Any) -> dict[str, Any]:
    return {**TINY, "max_steps": steps, "dataset_size": 64 * steps, "save_every": 0, **values}


async def training_seconds(kitchen: Kitchen, steps: int, save_every: int) -> float:
    """Return the seconds from the first optimizer step to the last."""
    run = await kitchen.start("supervised", config(steps, save_every=save_every))
    times = [record.time async for record in run.events() if isinstance(record.event, TrainingStep)]
    await run.wait()
    return times[-1] - times[0]


async def checkpoints(steps: int, repetitions: int) -> list[list[object]]:
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        async with Kitchen(home=folder) as kitchen:
            await training_seconds(kitchen, 10, 0)
            for turn in range(repetitions):
                order = (0, 10) if turn % 2 else (10, 0)
                took = {every: await training_seconds(kitchen, steps, every) for every in order}
                shares.append((took[10] / took[0] - 1) * 100)
    share = statistics.median(shares)
    return [["a checkpoint every 10 steps, share of training", f"{share:.1f} %", "< 5 %", held(share < 5)]]


@stage()
async def nothing() -> None:
    """Do nothing."""


def done_once(stages: int) -> Workflow:
    failed: list[int] = []

    @stage()
    async def last() -> None:
        if not failed:
            failed.append(1)
            raise TrainingError("as if killed")

    return Workflow("done", Loop("i", lambda: range(stages), nothing), last)


async def finished_stages(stages: int) -> list[list[object]]:
    workflow = done_once(stages)
    with tempfile.TemporaryDirectory() as folder:
        async with Kitchen(home=folder) as kitchen:
            run = await kitchen.start(workflow, {"durability": "behind"})
            try:
                await run.wait()
            except CrucibleError:
                began = time.perf_counter()
            again = await kitchen.reopen(run.id, target=workflow)
            await again.wait()
            took = time.perf_counter() - began
    return [[f"going on over {stages:,} finished stages", f"{took:.2f} s", "<= 0.5 s", held(took <= 0.5)]]


async def killed_run(home: Path) -> str:
    """Leave a run that failed right after its checkpoint."""

    @stage()
    async def dies() -> None:
        raise TrainingError("as if killed")

    broken = supervised.insert_after("log_epoch", dies).with_(name="supervised")
    async with Kitchen(home=home) as kitchen:
        run = await kitchen.start(broken, config(20, save_every=10, epochs=2, dataset_size=640))
        try:
            await run.wait()
        except CrucibleError:
            return run.id
    raise AssertionError("it did not fail")


async def first_new_step(home: Path, run_id: str) -> float:
    """Return the seconds from opening the store to the first new optimizer step."""
    began = time.perf_counter()
    async with Kitchen(home=home) as kitchen:
        run = await kitchen.reopen(run_id, allow_changed=("workflow", "code"))
        async for record in run.events():
            if isinstance(record.event, TrainingStep):
                took = time.perf_counter() - began
                await run.cancel()
                return took
        await run.wait()  # raises what kept it from a step
    raise AssertionError("it made no step")


async def cold(repetitions: int) -> list[list[object]]:
    times = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            run_id = await killed_run(Path(folder))
            command = [sys.executable, __file__, "--cold", folder, run_id]
            done = await anyio.run_process(command, stderr=None)
            times.append(float(done.stdout.split()[-1]))
    took = statistics.median(times)
    return [["cold start of a killed run to its next step, beyond imports", f"{took:.2f} s", "< 3 s", held(took < 3)]]


def held(holds: bool) -> str:
    return "yes" if holds else "NO"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--stages", type=int, default=10_000)
    parser.add_argument("--cold", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cold:
        import torch.optim  # noqa: F401

        import crucible_kitchen_torch.session  # noqa: F401

        print(await first_new_step(Path(args.cold[0]), args.cold[1]))
        return
    rows = await checkpoints(args.steps, args.repetitions)
    rows += await finished_stages(args.stages)
    rows += await cold(min(3, args.repetitions))
    print_table(f"Going on ({machine()})", ["what", "cost", "target", "held"], rows)


if __name__ == "__main__":
    anyio.run(main)
