"""How long a person waits: for the help text, for the import, for the first optimizer step, for a run to begin.

Prints two tables. CPU seconds count a whole process with all its threads, so that they mean something on a busy
machine; each figure is the median of the repetitions. Every process is started once before it is measured, so that
its files are in memory.

    python benchmarks/bench_start.py [--repetitions 7]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
from _table import machine, print_table

from crucible_kitchen.events import StageStart
from crucible_kitchen.kitchen import Kitchen

PROGRAM = Path(sys.executable).with_name("crucible-kitchen")
TORCH_IMPORTS = "import numpy, torch"
PRODUCT_IMPORTS = """
import crucible_kitchen.kitchen, crucible_kitchen.registry, crucible_kitchen.telemetry, crucible_kitchen.tasks
import crucible_kitchen.workflows.supervised, crucible_kitchen.store
import crucible_kitchen_files, crucible_kitchen_metrics, crucible_kitchen_sqlite
import crucible_kitchen_torch.session, crucible_kitchen_torch.tiny_backend
"""
FIRST_STEP = f"""
import json, sys, time
{TORCH_IMPORTS}
{PRODUCT_IMPORTS}
import anyio
from crucible_kitchen.events import TrainingStep
from crucible_kitchen.kitchen import Kitchen

async def main():
    clock, cpu = time.perf_counter(), time.process_time()
    async with Kitchen(home=sys.argv[1]) as kitchen:
        run = await kitchen.start("supervised", {{"model": "tiny", "dataset": "sums"}})
        async for record in run.events():
            if isinstance(record.event, TrainingStep):
                print(json.dumps([time.perf_counter() - clock, time.process_time() - cpu]))
                break
        await run.cancel()

anyio.run(main)
"""
NOOP = dict.fromkeys(("training_client", "dataset_store", "evaluator", "model_registry", "blob_store"), "noop")
NOOP_RUN = {"model": "noop", "dataset": "noop", "dataset_size": 40, "batch_size": 16, "eval_size": 8}


@dataclass(frozen=True)
class Seconds:
    """Seconds by the clock, and of the processor."""

    wall: float
    cpu: float


def process(*command: str | Path) -> Seconds:
    """Measure a whole process."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    return Seconds(time.perf_counter() - began, used.ru_utime + used.ru_stime)


def first_step() -> Seconds:
    """Measure the way from a kitchen to the first optimizer step, in a process that has imported everything."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-c", FIRST_STEP, home]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as the executor sets it when it imports torch
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return Seconds(*json.loads(done.stdout))


def median(measure: Callable[[], Seconds], repetitions: int) -> Seconds:
    """Measure a few times, after a first time that does not count."""
    measure()
    taken = [measure() for _ in range(repetitions)]
    return Seconds(statistics.median(each.wall for each in taken), statistics.median(each.cpu for each in taken))


def processes(repetitions: int) -> None:
    """Print what whole processes take."""
    python = partial(process, sys.executable, "-c")
    measures: Sequence[tuple[str, Callable[[], Seconds], float | None]] = (
        ("`python -c pass`", partial(python, "pass"), None),
        ("`import crucible_kitchen`", partial(python, "import crucible_kitchen"), 0.4),
        ("`crucible-kitchen --help`", partial(process, PROGRAM, "--help"), 0.6),
        ("`import torch`, for comparison", partial(python, TORCH_IMPORTS), None),
        ("everything that a run of `tiny` imports", partial(python, TORCH_IMPORTS + PRODUCT_IMPORTS), None),
        ("beyond imports: to `tiny`'s first optimizer step", first_step, 2.0),
    )
    rows = []
    for label, measure, target in measures:
        found = median(measure, repetitions)
        rows.append([label, found.cpu, found.wall, *_held(found.cpu, target)])
    print_table(f"What a person waits for ({machine()})", ["what", "CPU s", "wall s", "target", "held"], rows)


def _held(value: float, target: float | None) -> tuple[str, str]:
    return ("", "") if target is None else (f"<= {target:g}", "yes" if value <= target else "NO")


async def beginning_of_a_run(repetitions: int) -> None:
    """Print how long a run on noop adapters takes to begin, in a kitchen that is open.

    The event loop's thread does the engine's part; the rest is waiting for records to be safe on the disk.
    """
    handle: list[Seconds] = []
    stage, whole = [], []
    with tempfile.TemporaryDirectory() as home:
        async with Kitchen(NOOP, home=home) as kitchen:
            await kitchen.run("supervised", NOOP_RUN)
            for _ in range(repetitions):
                asked, wall, cpu = time.time(), time.perf_counter(), time.thread_time()
                run = await kitchen.start("supervised", NOOP_RUN)
                handle.append(Seconds(time.perf_counter() - wall, time.thread_time() - cpu))
                await run.wait()
                whole.append(time.perf_counter() - wall)
                starts = [record.time async for record in run.events() if isinstance(record.event, StageStart)]
                stage.append(starts[0] - asked)
    engine = statistics.median(each.cpu for each in handle) * 1e3
    rows = [
        ["`Kitchen.start`, CPU of the event loop's thread", engine, *_held(engine, 5)],
        ["`Kitchen.start`, wall", statistics.median(each.wall for each in handle) * 1e3, "", ""],
        ["from the call to the first stage, wall", statistics.median(stage) * 1e3, "", ""],
        ["the whole run, wall", statistics.median(whole) * 1e3, "", ""],
    ]
    print_table("A run on noop adapters begins", ["what", "ms", "target", "held"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    processes(args.repetitions)
    anyio.run(beginning_of_a_run, 5 * args.repetitions)


if __name__ == "__main__":
    main()
