"""RLHF: supervised fine-tuning, a reward model, reinforcement learning, each a workflow nested in this one.

What one part trained is where the next begins: the reward model and the policy start from the fine-tuned weights, the
policy's answers are scored by the reward model. Read next: the three workflows.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

from pydantic import model_validator

from crucible_kitchen.config import RunConfig
from crucible_kitchen.ports import BlobStore, TrainingCapabilities, TrainingClient, TrainingSession
from crucible_kitchen.stages.rollout import ReinforcementPartsConfig, init_policy_session
from crucible_kitchen.stages.stored import fetched, model_at
from crucible_kitchen.stages.training import save_final
from crucible_kitchen.tasks import TASKS
from crucible_kitchen.types import BlobRef
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage
from crucible_kitchen.workflows.reinforcement import ReinforcementConfig, reinforcement
from crucible_kitchen.workflows.reward_model import RewardModelConfig, reward_model
from crucible_kitchen.workflows.supervised import SupervisedConfig, supervised

__all__ = ["RlhfConfig", "rlhf_workflow"]


class RlhfConfig(RunConfig):
    """Everything that can be set for RLHF: what the parts share, and a config of each."""

    model: str
    """The model that all three parts begin with."""

    dataset: str = ""
    """A built-in task that serves all three; unset: each part names its own."""

    supervised: SupervisedConfig
    """Supervised fine-tuning: its own keys."""

    reward: RewardModelConfig
    """The reward model: its own keys."""

    reinforcement: ReinforcementConfig
    """Reinforcement learning: its own keys; unset, advantages compare answers to one problem (``advantage=grpo``)."""

    def unrepeatable(self) -> str | None:
        """See ``RunConfig``: the part that samples decides."""
        return self.reinforcement.unrepeatable()

    def decided(self, can: TrainingCapabilities) -> Mapping[str, str]:
        """See ``RunConfig``: the part that has a choice."""
        return self.reinforcement.decided(can)

    @model_validator(mode="before")
    @classmethod
    def _parts_share(cls, values: Any) -> Any:
        """Give each part what was said once."""
        if not isinstance(values, Mapping):
            return values
        shared = {key: values[key] for key in ("model", "seed") if key in values}
        dataset = {"dataset": values["dataset"]} if values.get("dataset") else {}
        defaults = {
            "supervised": shared | dataset,
            "reward": shared | dataset,
            "reinforcement": shared | {"env": values.get("dataset"), "advantage": "grpo"},
        }
        parts = {}
        for name, default in defaults.items():
            given = values.get(name, {})
            known = {key: value for key, value in default.items() if value is not None}
            parts[name] = {**known, **given} if isinstance(given, Mapping) else given
        return {**values, **parts}

    @model_validator(mode="after")
    def _one_model_and_no_other_scorer(self) -> Self:
        if self.dataset and self.dataset not in TASKS:
            raise ValueError(f"dataset is a built-in task ({', '.join(TASKS)}); name other data in each part")
        if len({self.model, self.supervised.model, self.reward.model, self.reinforcement.model}) > 1:
            raise ValueError("the parts begin with one model: name it once, as model")
        if self.reinforcement.reward_model or self.reinforcement.judge:
            raise ValueError("reinforcement.reward_model and judge: the reward model is the one that this run trains")
        return self


@stage(writes="session", name="init_session")
async def init_from_fine_tuned(
    training_client: TrainingClient,
    config: ReinforcementPartsConfig,
    sft_weights: BlobRef,
    run: Run,
    blob_store: BlobStore | None = None,
) -> AsyncIterator[TrainingSession]:
    """Open the policy's session on the fine-tuned weights."""
    started = model_at(config, await fetched(sft_weights.uri, "sft", blob_store, run))
    async with asynccontextmanager(init_policy_session.fn)(training_client, started, run) as session:
        yield session


for _hook in init_policy_session.hooks.validate:
    init_from_fine_tuned.validate(_hook)


def _part(workflow: Workflow, field: str, weights: str) -> Workflow:
    """Return a workflow as a part: it registers nothing, and what it trained has a name of its own."""
    body = workflow.without("register_model").without("check_parent")
    body = body.replace("save_final", save_final.with_(writes=weights))
    return Workflow(
        workflow.name,
        *body.body,
        config=workflow.config,
        returns=(weights,),
        description=workflow.description,
        config_field=field,
    )


fine_tuning = _part(supervised, "supervised", "sft_weights")
comparing = _part(reward_model, "reward", "reward_weights")
reinforcing = Workflow(
    "reinforcement",
    *reinforcement.replace("init_session", init_from_fine_tuned).body,
    config=ReinforcementConfig,
    returns=("final_weights", "eval_results"),
    config_field="reinforcement",
)

rlhf_workflow = Workflow(
    "rlhf",
    fine_tuning,
    comparing,
    reinforcing,
    config=RlhfConfig,
    description="Supervised fine-tuning, a reward model, and reinforcement learning on its scores",
)
