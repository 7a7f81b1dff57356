"""Steps of different sizes on backends that scale by any number, by one for the whole run, or not at all."""

import pytest

from crucible_kitchen.events import DistillationStep, DpoStep, TrainingStep
from crucible_kitchen.kitchen import Kitchen

pytestmark = pytest.mark.anyio

UNEVEN = {"model": "toy", "dataset": "sums", "dataset_size": 14, "batch_size": 4, "eval_size": 2, "learning_rate": 0.05}
RUNS = {
    "supervised": ("supervised", {}, TrainingStep),
    "accumulated": ("supervised", {"gradient_accumulation": 2, "batch_size": 2}, TrainingStep),
    "preference": ("preference", {}, DpoStep),
    "distillation": ("distillation", {"method": "off_policy", "teacher": "toy"}, DistillationStep),
    "outputs": ("distillation", {"method": "top_k", "teacher": "toy"}, DistillationStep),
}


async def steps(home, name, step_scale):
    workflow, config, kind = RUNS[name]
    client = ("noop", {"capabilities": {"step_scale": step_scale}})
    async with Kitchen(
        {"training_client": client, "blob_store": "noop", "model_registry": "noop"}, home=home
    ) as kitchen:
        run = await kitchen.start(workflow, UNEVEN | config)
        told = [record.event async for record in run.events()]
        await run.wait()
    found = [event for event in told if isinstance(event, kind)]
    return [[getattr(event, name) for name in event.measurements if name != "tokens_per_sec"] for event in found]


@pytest.mark.parametrize("name", RUNS)
async def test_the_same_run_whoever_applies_the_scale(name, home):
    exact = await steps(home, name, "exact")
    assert len(exact) >= 4, "the last batch is a smaller one"
    for scale in ("constant", "none"):
        found = await steps(home, name, scale)
        for ours, theirs in zip(exact, found, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
