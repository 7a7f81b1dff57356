"""Preference losses and on-policy distillation are functions of log-probabilities: over the wire they are the same."""

import pytest

from crucible_kitchen.events import DistillationStep, DpoStep
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen_http import HttpTrainingClient
from crucible_kitchen_torch import TorchTrainingClient

pytestmark = pytest.mark.anyio

SMALL = {"model": "tiny", "dataset": "sums", "dataset_size": 16, "batch_size": 8, "eval_size": 2, "lora_rank": 4}
RUNS = {
    "sigmoid": ("preference", SMALL),
    "orpo": ("preference", SMALL | {"loss": "orpo"}),
    "kto": ("preference", SMALL | {"loss": "kto", "batch_size": 16}),
    "on_policy": (
        "distillation",
        SMALL
        | {
            "teacher": "tiny",
            "sample_max_tokens": 3,
            "eval_max_tokens": 2,
            "sampling": "deterministic",
            "discount": 0.5,
        },
    ),
}


@pytest.fixture
async def client(server):
    client = HttpTrainingClient(base_url=server.url, api_key="a-key")
    yield client
    await client.aclose()


async def steps(client, home, workflow, config):
    """The measurements of every step of a run."""
    async with Kitchen(home=home) as kitchen:
        run = await kitchen.start(workflow, config, adapters={"training_client": client, "evaluator": None})
        events = [record.event async for record in run.events()]
        await run.wait()
    told = [e for e in events if isinstance(e, (DpoStep, DistillationStep))]
    return [[getattr(e, name) for name in e.measurements] for e in told]


@pytest.mark.parametrize("name", RUNS)
async def test_a_workflow_over_the_wire_has_the_steps_of_the_local_run(name, client, home):
    far = await steps(client, home, *RUNS[name])
    near = await steps(TorchTrainingClient(threads=1), home, *RUNS[name])
    assert len(far) == len(near) >= 2
    for ours, theirs in zip(near[1:], far[1:], strict=True):  # before the first step rounding decides the accuracy
        assert theirs == pytest.approx(ours, abs=1e-4)
