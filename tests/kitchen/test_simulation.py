"""Seeded schedules over whole runs: calls fail, answers get lost, calls wait and hang, people cancel and drain.

Whatever comes, a run that is resumed until it completes has the weights of one that nobody disturbed. A failing seed
stands in the name of the test that failed.
"""

import math
import random
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen import Kitchen
from crucible_kitchen.errors import CrucibleError, TransientBackendError
from crucible_kitchen.events import TrainingStep
from crucible_kitchen.runs import RunHandle, RunResult
from crucible_kitchen.store import MemoryRunStore
from crucible_kitchen.testing.clock import seeded_schedule, virtual_clock
from crucible_kitchen.testing.faults import Fault, delays, fails, hangs, with_faults
from crucible_kitchen.workers import inline
from crucible_kitchen_noop import NoopTrainingClient

SEEDS, ATTEMPTS = 12, 6
METHODS = ("open_session", "forward_backward", "apply", "save_state", "load_state", "export")
RUN = {
    "epochs": 3,
    "dataset_size": 32,
    "save_every": 2,
    "grad_clip_norm": 0.5,
    "stage_timeout": 60,
    "stall_after": 300,
    "on_stall": "abort",
}


def misfortune(rng: random.Random) -> list[Fault]:
    """Draw what goes wrong in one attempt."""
    drawn = []
    for method in METHODS:
        luck, call = rng.random(), rng.randrange(1, 8)
        if luck < 0.08:
            drawn.append(fails(method, TransientBackendError("lost"), call=call, late=rng.random() < 0.5))
        elif luck < 0.2:
            drawn.append(delays(method, rng.choice([0.1, 5, 50]), call=call))
        elif luck < 0.25:
            drawn.append(hangs(method, call=call))
    return drawn


async def to_its_end(handle: RunHandle, rng: random.Random) -> RunResult | None:
    """Wait for an attempt that somebody may cancel or drain meanwhile; None where it did not complete."""

    async def interrupt() -> None:
        await anyio.sleep(rng.choice([1, 4, 7, math.inf, math.inf]))
        await rng.choice([handle.cancel, handle.drain])()

    async with anyio.create_task_group() as group:
        group.start_soon(interrupt)
        try:
            return await handle.wait()
        except CrucibleError:
            return None
        finally:
            group.cancel_scope.cancel()


async def disturbed(adapters: dict[str, Any], config: dict[str, Any], home: Path, seed: int) -> tuple[Any, list[int]]:
    """Let several attempts meet with misfortune, and the next one complete; return its result and the logged steps."""
    rng = random.Random(seed)
    async with Kitchen(adapters, home=home, store=MemoryRunStore()) as kitchen:
        client = {"training_client": with_faults(NoopTrainingClient(latency=0.5), *misfortune(rng))}
        handle = await kitchen.start("supervised", config, adapters=client)
        for _ in range(ATTEMPTS):
            if (result := await to_its_end(handle, rng)) is not None:
                break
            client = {"training_client": with_faults(NoopTrainingClient(latency=0.5), *misfortune(rng))}
            handle = await kitchen.reopen(handle.id, adapters=client)
        else:
            await handle.cancel()
            handle = await kitchen.reopen(
                handle.id, adapters={"training_client": with_faults(NoopTrainingClient(latency=0.5))}
            )
            result = await handle.wait()
        records = await kitchen.store.read(handle.id, 0, 10_000)
    steps = {record.event.step: None for record in records if isinstance(record.event, TrainingStep)}
    return result, list(steps)


def weights(result: RunResult) -> str:
    return next(artifact.sha256 for artifact in result.artifacts if artifact.kind == "weights")


CHAOS = [pytest.param(seed, marks=pytest.mark.chaos) for seed in range(1000, 1200)]


@pytest.mark.parametrize("seed", [*range(SEEDS), *CHAOS])
def test_under_any_schedule_and_any_misfortune_the_weights_are_the_same(
    seed: int, noop: dict[str, Any], config: dict[str, Any], home: Path
) -> None:
    name, options = virtual_clock()
    config = {**config, **RUN}
    calm = anyio.run(Kitchen(noop, home=home / "calm", store=MemoryRunStore()).run, "supervised", config)
    with seeded_schedule(seed), inline():
        wild, steps = anyio.run(disturbed, noop, config, home / "wild", seed, backend=name, backend_options=options)
    assert weights(wild) == weights(calm)
    assert steps == list(range(1, 7))
    assert wild.state.eval_results == calm.state.eval_results
