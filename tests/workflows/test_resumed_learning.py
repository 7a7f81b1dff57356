"""Preference learning and distillation that die at any write and are resumed end like those that were not disturbed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.config import build_config
from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.testing.memory import MortalMemory
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.run import RunContext
from crucible_kitchen.workflows.distillation import distillation
from crucible_kitchen.workflows.preference import preference
from crucible_kitchen.workflows.rlhf import rlhf_workflow
from crucible_kitchen_files import FilesDatasetStore
from crucible_kitchen_noop import (
    NoopBlobStore,
    NoopEvaluator,
    NoopModelRegistry,
    NoopSamplingClient,
    NoopTrainingClient,
)
from crucible_kitchen_noop.sampler import NoopSampler
from crucible_kitchen_noop.session import NoopSession

pytestmark = pytest.mark.anyio

PAIRS = [{"prompt": f"{i}{c}", "chosen": c.upper(), "rejected": c + c} for i in range(6) for c in "abcd"]
PROMPTS = [{"prompt": f"{i}{c}", "completion": c.upper()} for i in range(6) for c in "abcd"]
SMALL = {"model": "noop", "batch_size": 6, "holdout": 8, "learning_rate": 0.1, "save_every": 2, "epochs": 2}
TAUGHT = SMALL | {"teacher": "teacher", "sample_max_tokens": 2, "eval_max_tokens": 2}
PART = {"dataset_size": 16, "eval_size": 2, "batch_size": 8, "save_every": 1}
RLHF = {
    "supervised": PART | {"eval_max_tokens": 2},
    "reward": PART,
    "reinforcement": {
        "group_size": 2,
        "groups_per_batch": 2,
        "num_rollouts": 2,
        "max_tokens": 2,
        "eval_size": 2,
        "save_every": 1,
        "sampling": "deterministic",
    },
}
RUNS = {
    "preference": (preference, PAIRS, SMALL | {"eval_every": 2, "save_best": True}),
    "kto": (preference, PAIRS, SMALL | {"loss": "kto"}),
    "on_policy": (distillation, PROMPTS, TAUGHT | {"sampling": "deterministic"}),
    "off_policy": (distillation, PROMPTS, TAUGHT | {"method": "off_policy"}),
    "rlhf": (rlhf_workflow, [], {"model": "noop", "dataset": "sums", **RLHF}),
}


class World:
    """What outlives a run's death."""

    def __init__(self, directory: Path, workflow: Workflow, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # the same place for every run: an export tells where it began
        directory.mkdir()
        path = directory / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.workflow = workflow
        self.config = workflow.config.model_validate({"dataset": str(path), **config})
        self.directory = directory
        self.memory = MortalMemory()
        self.adapters = {
            "training_client": NoopTrainingClient(),
            "dataset_store": FilesDatasetStore(),
            "blob_store": NoopBlobStore(),
            "evaluator": NoopEvaluator(),
            "model_registry": NoopModelRegistry(),
        }
        if "teacher" in config:
            self.adapters["sampling_client"] = NoopSamplingClient()

    async def attempt(self, budget: int | None = None) -> dict[str, Any]:
        memory = self.memory.begin(budget)
        name = self.workflow.name
        context = RunContext("r", name, self.config.seed, self.directory, memory, memory=memory)
        state = await execute(self.workflow, self.config, self.adapters, context)
        weights = state["final_weights"]
        kinds = sorted(artifact.kind for artifact in context.artifacts)
        results = state["eval_results"]
        told = state.get("dpo_metrics") or state.get("distillation_metrics")
        return {"weights": weights.sha256, "artifacts": kinds, "results": results, "told": told}


@pytest.mark.parametrize("name", RUNS)
async def test_a_run_that_dies_anywhere_ends_as_if_undisturbed(name: str, tmp_path: Path) -> None:
    undisturbed = World(tmp_path / "run", *RUNS[name])
    check(undisturbed.workflow, adapters=undisturbed.adapters, config=undisturbed.config)
    expected = await undisturbed.attempt()
    step = max(1, undisturbed.memory.writes // 12)
    for budget in range(1, undisturbed.memory.writes, step):
        world = World(tmp_path / "run", *RUNS[name])
        with pytest.raises(CrucibleError, match="the run is dead"):
            await world.attempt(budget)
        assert await world.attempt() == expected, f"died after {budget} of {undisturbed.memory.writes} writes"


async def test_what_was_scored_and_said_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    asked: list[int] = []
    forward, sample = NoopSession.forward, NoopSampler.sample

    async def counted(self: NoopSession, datums: Any, **options: Any) -> Any:
        scored.append(len(datums))
        return await forward(self, datums, **options)

    async def sampled(self: NoopSampler, prompt: Any, params: Any, n: int = 1) -> Any:
        asked.append(params.seed)
        return await sample(self, prompt, params, n)

    monkeypatch.setattr(NoopSession, "forward", counted)
    monkeypatch.setattr(NoopSampler, "sample", sampled)
    for kind, calls in (("preference", scored), ("off_policy", asked)):
        workflow, rows, config = RUNS[kind]
        config = {k: v for k, v in config.items() if k not in ("eval_every", "save_best")} | {"holdout": 0}
        world = World(tmp_path / kind, workflow, rows, config)
        world.adapters["evaluator"] = None  # type: ignore[assignment]
        with pytest.raises(CrucibleError, match="dead"):
            await world.attempt(40)
        first = sum(calls) if kind == "preference" else len(calls)
        with pytest.raises(KeyError):  # nothing was held out, so nothing is evaluated
            await world.attempt()
        assert (sum(calls) if kind == "preference" else len(calls)) == first > 0


@pytest.mark.parametrize("name", RUNS)
def test_a_config_that_was_stored_is_accepted_again(name: str) -> None:
    workflow, _, config = RUNS[name]
    built = build_config(workflow.config, {"dataset": "sums", **config})
    assert build_config(workflow.config, json.loads(built.model_dump_json())) == built
