"""Reward models and judges score groups; RLHF chains three workflows in one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.errors import BackendUserError, ConfigError, TransientBackendError, WorkflowError
from crucible_kitchen.events import DpoDatasetBuilt, DpoEvaluated, Event, RolloutComplete, StageStart
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.ports import ChatReply
from crucible_kitchen.recipes.rlhf import rlhf
from crucible_kitchen.runs import RunResult
from crucible_kitchen.stages.reward_model import reward_datums
from crucible_kitchen.stages.scoring import Judge, RewardModel
from crucible_kitchen.types import Datum, Message
from crucible_kitchen_noop import NoopLLMClient, NoopTrainingClient
from crucible_kitchen_noop.tokenizer import ByteTokenizer

pytestmark = pytest.mark.anyio

ROLLOUTS = {
    "model": "tiny",
    "env": "sums",
    "advantage": "grpo",
    "group_size": 4,
    "groups_per_batch": 2,
    "num_rollouts": 2,
    "max_tokens": 4,
    "eval_size": 3,
}
SMALL_RLHF = {
    "supervised": {"dataset_size": 32, "eval_size": 2, "eval_max_tokens": 2, "batch_size": 16, "save_every": 1},
    "reward": {"dataset_size": 32, "eval_size": 2, "batch_size": 16, "save_every": 1},
    "reinforcement": {k: v for k, v in ROLLOUTS.items() if k not in ("model", "env", "advantage")} | {"save_every": 1},
}


@pytest.fixture
def kitchen(home: Path) -> Kitchen:
    """A closed kitchen on the noop backend."""
    return Kitchen({"training_client": "noop"}, home=home)


async def run(kitchen: Kitchen, what: Any, config: dict[str, Any], **adapters: Any) -> tuple[RunResult, list[Event]]:
    """Run to the end and return the result and all events."""
    async with kitchen:
        handle = await kitchen.start(what, config, adapters=adapters)
        events = [record.event async for record in handle.events()]
        return await handle.wait(), events


# --- the reward model ------------------------------------------------------------------------------------------------


def test_a_reward_model_reads_whole_answers_at_their_last_token() -> None:
    (datum,) = reward_datums([Datum.from_tokens([5, 6, 7, 2], [0, 0, 1, 1], "train/3")])
    assert datum.inputs["tokens"].tolist() == [5, 6, 7, 2]
    assert datum.loss_inputs["weights"].tolist() == [0, 0, 0, 1]
    assert datum.key == "train/3"


async def test_a_reward_model_is_trained_measured_and_registered(kitchen: Kitchen) -> None:
    config = {"model": "any", "dataset": "sums", "dataset_size": 40, "batch_size": 8, "eval_size": 5}
    result, events = await run(kitchen, "reward_model", config)
    assert result.state.reward_metrics["loss"] == pytest.approx(np.log(2)), "the toy sees the same last token in all"
    assert result.state.eval_results["n"] == 5
    assert result.state.registered_model.id == "reward_model-any-sums:1"
    assert sum(isinstance(e, DpoDatasetBuilt) for e in events) == 1
    assert sum(isinstance(e, DpoEvaluated) for e in events) == 1


async def test_a_backend_without_a_head_is_refused_with_the_alternative(kitchen: Kitchen) -> None:
    client = NoopTrainingClient(capabilities={"value_head": False})
    with pytest.raises(WorkflowError, match=r"judge=\.\.\."):
        kitchen.check("reward_model", {"model": "any", "dataset": "sums"}, adapters={"training_client": client})


class Heads:
    """A sampler that scores a sequence by its length."""

    tokenizer = ByteTokenizer()

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    async def score(self, sequences: Sequence[Sequence[int]]) -> Any:
        self.seen += [list(s) for s in sequences]
        return np.array([len(s) for s in sequences], np.float32)


async def test_a_reward_model_scores_prompt_answer_and_end() -> None:
    heads = Heads()
    scores = await RewardModel(heads, chat=False)([Message("user", "1+1=")], ["2", "12"])  # type: ignore[arg-type]
    prompt = [*heads.tokenizer.prefix_ids, *heads.tokenizer.encode("1+1=")]
    assert heads.seen[0] == [*prompt, *heads.tokenizer.encode("2"), heads.tokenizer.eos_id]
    assert scores[1] == scores[0] + 1


# --- judges ----------------------------------------------------------------------------------------------------------


class Marks(NoopLLMClient):
    """A judge that marks by a function of the shown JSON."""

    def __init__(self, marks: Any = None, error: Exception | None = None) -> None:
        super().__init__()
        self.shown: list[str] = []
        self._marks, self._error = marks, error

    async def chat(self, messages: Sequence[Message], **options: Any) -> ChatReply:
        self.shown.append(messages[-1].content)
        if self._error is not None:
            raise self._error
        if self._marks is not None:
            return ChatReply("", self._marks)
        return await super().chat(messages, **options)


async def test_a_judge_sees_all_answers_of_a_group_and_marks_each() -> None:
    client = Marks({"marks": [0.25, 1]})
    assert await Judge(client, "Is it right?")([Message("user", "1+1=")], ["3", "2"]) == [0.25, 1.0]
    assert all(text in client.shown[0] for text in ("1+1=", '"3"', '"2"'))


@pytest.mark.parametrize("marks", [{"marks": [1]}, {"marks": [1, float("nan")]}, {}, [], None])
async def test_a_reply_without_a_mark_for_each_is_an_error_and_no_reward(marks: Any) -> None:
    class Silent(Marks):
        async def chat(self, messages: Sequence[Message], **options: Any) -> ChatReply:
            return ChatReply("", marks)

    with pytest.raises(BackendUserError, match="no mark for each of 2 answers"):
        await Judge(Silent(), "Is it right?")([Message("user", "1+1=")], ["3", "2"])


def rollouts(events: list[Event]) -> list[RolloutComplete]:
    return [e for e in events if isinstance(e, RolloutComplete)]


async def test_a_judge_s_marks_are_the_rewards_and_the_environment_s_verdict_is_still_reported(
    kitchen: Kitchen,
) -> None:
    client = Marks()
    result, events = await run(kitchen, "reinforcement", {**ROLLOUTS, "judge": "Is it right?"}, llm_client=client)
    for event in rollouts(events):
        assert 0 < event.reward_mean < 10, "the noop judge's marks, where the toy model never earns a reward"
        assert event.metrics["correct"] == 0
    assert len(client.shown) == 2 * 2 + 3, "one call per group, and per held-out problem"
    assert result.state.eval_results["reward_mean"] > 0


async def test_the_environment_s_own_reward_counts_as_much_as_was_said(kitchen: Kitchen) -> None:
    config = {**ROLLOUTS, "judge": "Is it right?", "own_reward": 1.0}
    _, events = await run(kitchen, "reinforcement", config, llm_client=Marks({"marks": [0.5] * 4}))
    assert [e.reward_mean for e in rollouts(events)] == [0.5, 0.5]


async def test_a_judge_that_fails_is_never_a_reward(kitchen: Kitchen) -> None:
    broken = Marks(error=TransientBackendError("not now"))
    with pytest.raises(Exception) as caught:
        await run(kitchen, "reinforcement", {**ROLLOUTS, "judge": "Is it right?"}, llm_client=broken)
    assert "reward" not in type(caught.value).__name__.lower()


async def test_a_registered_reward_model_scores_rollouts(kitchen: Kitchen) -> None:
    small = {"model": "any", "dataset": "sums", "dataset_size": 16, "batch_size": 8, "eval_size": 2}
    async with kitchen:
        taught = await kitchen.run("reward_model", small)
        scored = await kitchen.run("reinforcement", {**ROLLOUTS, "reward_model": taught.state.registered_model.id})
    assert scored.status == "completed"
    assert np.isfinite(scored.state.eval_results["reward_mean"])


async def test_one_scorer_at_most(kitchen: Kitchen) -> None:
    with pytest.raises(ConfigError, match="reward_model or judge, not both"):
        kitchen.check("reinforcement", {**ROLLOUTS, "judge": "x", "reward_model": "y"})


# --- RLHF ------------------------------------------------------------------------------------------------------------


async def test_rlhf_chains_three_workflows_and_registers_the_policy_alone(kitchen: Kitchen, home: Path) -> None:
    result, events = await run(kitchen, rlhf, SMALL_RLHF)
    began = [e.path for e in events if isinstance(e, StageStart)]
    parts = list(dict.fromkeys(path.split("/")[1] for path in began if path.count("/") > 1))
    assert parts == ["supervised", "reward_model", "reinforcement"]
    assert [path.split("/")[1] for path in began if path.endswith("save_final")] == parts
    assert [path for path in began if path.endswith("register_model")] == ["rlhf/reinforcement/register_model"]
    directory = home / "runs" / result.run_id
    assert (directory / "sft").is_dir()
    assert (directory / "reward").is_dir()
    assert np.isfinite(result.state.eval_results["reward_mean"])


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"dataset": "some.jsonl"}, "name other data in each part"),
        ({"reward": {"model": "other"}}, "the parts begin with one model"),
        ({"reinforcement": {"judge": "x"}}, "the one that this run trains"),
        ({"supervised": {"epoch": 1}}, "supervised.epoch"),
    ],
)
def test_what_the_parts_cannot_share_is_refused(kitchen: Kitchen, keys: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        kitchen.check(rlhf, dict(keys))
