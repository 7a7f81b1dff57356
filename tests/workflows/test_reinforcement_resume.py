"""A reinforcement run that dies at any write and is resumed: bit for bit at K = 0, by the ledger's law at K = 2."""

from typing import Any

import pytest

from crucible_kitchen import events as e
from crucible_kitchen.config import build_config
from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.testing.environments import installed
from crucible_kitchen.testing.memory import MortalMemory
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.memory import Keep
from crucible_kitchen.workflow.run import Run, RunContext
from crucible_kitchen.workflow.stage import stage
from crucible_kitchen.workflows.reinforcement import ReinforcementConfig, reinforcement
from crucible_kitchen_noop import NoopBlobStore, NoopModelRegistry, NoopTrainingClient

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def letters() -> Any:
    with installed():
        yield


@stage()
async def save(run: Run) -> None:
    run.checkpoint(Keep(last=2))


WORKFLOW = reinforcement.replace("save_checkpoint", save)


def config(**values):
    settings = {
        "model": "noop",
        "lora_rank": 0,
        "env": "letters",
        "env_options": {"seconds": "0.002"},
        "advantage": "grpo",
        "group_size": 2,
        "groups_per_batch": 2,
        "num_rollouts": 5,
        "max_tokens": 4,
        "eval_size": 2,
        "save_every": 2,
        "learning_rate": 0.05,
        "normalize": "running",
        "sampling": "deterministic",
        "durability": "behind",
    }
    return build_config(ReinforcementConfig, settings | values)


class World:
    """What outlives a run's death."""

    def __init__(self, directory, settings):
        self.memory = MortalMemory()
        self.directory = directory
        self.directory.mkdir()
        self.settings = settings
        self.adapters = {
            "training_client": NoopTrainingClient(),
            "blob_store": NoopBlobStore(),
            "model_registry": NoopModelRegistry(),
        }
        check(WORKFLOW, adapters=self.adapters, config=settings)

    async def attempt(self, budget=None):
        memory = self.memory.begin(budget)
        context = RunContext("r", WORKFLOW.name, 0, self.directory, memory, memory=memory)
        return await execute(WORKFLOW, self.settings, self.adapters, context)

    async def to_the_end(self, *budgets):
        for budget in budgets:
            try:
                return await self.attempt(budget)
            except CrucibleError:
                pass
        return await self.attempt()

    def trained(self):
        """Return the groups of the surviving history: the last ones told of each update."""
        told = {x.rollout_index: list(x.groups) for x in self.memory.events if isinstance(x, e.RolloutComplete)}
        return [index for update in sorted(told) for index in told[update]]

    def ledger(self):
        return [x for x in self.memory.events if isinstance(x, e.PipelineMeasured)][-1].ledger


def numbers(state):
    keep = ("policy", "loss", "grad_norm", "scales", "step")
    return {key: getattr(state["step"], key) for key in keep} | {"weights": state["final_weights"].sha256}


@pytest.mark.parametrize("values", [{}, {"ppo_epochs": 2, "minibatches": 2, "normalize": "batch", "advantage": "gae"}])
async def test_at_k_0_a_run_that_dies_at_any_write_ends_with_the_same_bits(tmp_path, values):
    calm = World(tmp_path / "calm", config(**values))
    wanted = numbers(await calm.attempt())
    total = calm.memory.writes
    for budget in range(0, total, max(1, total // 12)):
        world = World(tmp_path / f"at-{budget}", config(**values))
        assert numbers(await world.to_the_end(budget)) == wanted, budget
        assert sorted(world.trained()) == list(range(10)), budget


@pytest.mark.parametrize("policy", ["aggregate", "block"])
async def test_at_k_2_nothing_is_trained_twice_or_lost_however_often_a_run_dies(tmp_path, policy):
    settings = config(max_staleness=2, staleness_policy=policy, num_rollouts=8)
    calm = World(tmp_path / "calm", settings)
    await calm.attempt()
    total, requeued = calm.memory.writes, 0
    for budget in range(total // 6, total, max(1, total // 8)):
        world = World(tmp_path / f"at-{budget}", settings)
        await world.to_the_end(budget, budget // 2, budget // 3)
        assert sorted(world.trained()) == list(range(16)), budget
        ledger = world.ledger()
        assert ledger["drawn"] == ledger["trained"] == 16, budget
        assert not ledger["dropped"], budget
        requeued += ledger["requeued"]
    assert requeued, "no run died with groups in flight"
