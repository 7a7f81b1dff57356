"""The reinforcement workflow on the noop backend, whose little model really learns from rewards."""

import json
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest

from crucible_kitchen import events as e
from crucible_kitchen.config import build_config
from crucible_kitchen.errors import ConfigError, CrucibleError, RunChanged, TransientBackendError, WorkflowError
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.learner import PPO, grpo
from crucible_kitchen.registry import Registry
from crucible_kitchen.rl.batch import Batch
from crucible_kitchen.rl.rollout import derived_seed
from crucible_kitchen.rl.staleness import problem_order
from crucible_kitchen.rl.trajectories import TrajectoryGroup
from crucible_kitchen.stages.curves import Curves
from crucible_kitchen.telemetry.tensorboard import TensorBoardSink
from crucible_kitchen.testing.environments import installed
from crucible_kitchen.testing.faults import fails, with_faults
from crucible_kitchen.types import AdamParams, Datum, SamplingParams, SessionSpec
from crucible_kitchen.workflow.stage import stage
from crucible_kitchen.workflows.reinforcement import ReinforcementConfig, reinforcement
from crucible_kitchen_noop import NoopTrainingClient

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def letters() -> Any:
    with installed():
        yield


@pytest.fixture
def config() -> dict[str, Any]:
    """A run of five small updates."""
    return {
        "model": "noop",
        "lora_rank": 0,
        "env": "letters",
        "advantage": "grpo",
        "group_size": 4,
        "groups_per_batch": 3,
        "num_rollouts": 5,
        "max_tokens": 6,
        "eval_size": 4,
        "learning_rate": 0.05,
        "lr_schedule": "constant",
        "sampling": "deterministic",
    }


async def run(home: Any, config: dict[str, Any], workflow: Any = "reinforcement", **capabilities: Any) -> Any:
    """Run to the end and return the result and all events."""
    adapters = {
        "training_client": ("noop", {"capabilities": capabilities}),
        "blob_store": "noop",
        "model_registry": "noop",
    }
    async with Kitchen(adapters, home=home) as kitchen:
        handle = await kitchen.start(workflow, config)
        found = [record.event async for record in handle.events()]
        return await handle.wait(), found


def of(events: list[e.Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def weights(result: Any) -> str:
    """Return the hash of what was trained."""
    return str(result.state.final_weights.sha256)


async def test_a_run_reports_rollouts_updates_and_a_registered_model(home, config):
    result, events = await run(home, config)
    assert result.status == "completed"
    assert result.state.rollout_metrics["num_trajectories"] == 12
    assert {"reward_mean", "reward_std"} <= result.state.rollout_metrics.keys()
    assert {"policy_loss", "entropy", "clip_fraction"} <= result.state.ppo_metrics.keys()
    assert result.state.eval_results["synthetic"]
    assert result.state.registered_model.id == "reinforcement-noop-letters:1"
    assert result.state.registered_model.lineage["dataset"] == "letters"
    counts = Counter(event.name for event in events)
    assert counts["rl.env_group_built"] == 1
    for name in ("rollout_complete", "advantages_computed", "ppo_update", "step", "pipeline"):
        assert counts[f"rl.{name}"] == 5
    assert [event.step for event in of(events, e.RLStep)] == [1, 2, 3, 4, 5]
    assert of(events, e.PipelineMeasured)[-1].ledger == {"drawn": 15, "trained": 15, "requeued": 0, "dropped": {}}


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("advantage", ["grpo", "gae"])
async def test_rewards_rise(home, config, k, advantage):
    values = {**config, "num_rollouts": 40, "max_staleness": k, "advantage": advantage, "learning_rate": 0.3}
    values |= {"env_options": {"problems": "2"}, "max_tokens": 1, "groups_per_batch": 16}
    if advantage == "gae":
        values["normalize"] = "batch"
    _, events = await run(home, values)
    rewards = [event.reward_mean for event in of(events, e.RLStep)]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.1


@pytest.mark.parametrize("backend", ["noop", "torch"])
async def test_without_staleness_the_result_is_the_plain_sequential_loop_s_bit_for_bit(home, config, backend):
    """The loop below knows nothing of actors, queues or stages."""
    from crucible_kitchen_noop import NoopTrainingClient
    from crucible_kitchen_torch import TorchTrainingClient

    client = NoopTrainingClient(capabilities={"entropy": False}) if backend == "noop" else TorchTrainingClient()
    values = {**config, "model": "tiny", "env_options": {"seconds": "0.02"}}
    async with Kitchen({"training_client": client}, home=home) as kitchen:
        result = await kitchen.run("reinforcement", values)
    spec = SessionSpec("tiny", None, 0, str(home))
    order = problem_order(16, 0)
    async with client.open_session(spec) as session:
        for update in range(5):
            sampler = await session.sampler()
            step_datums, tokens = [], 0.0
            for index in range(update * 3, update * 3 + 3):
                prompt = [*session.tokenizer.prefix_ids, *session.tokenizer.encode(chr(ord("a") + order(index) % 26))]
                samples = []
                for member in range(4):
                    seed = derived_seed(0, "sample", index, member, 0)
                    params = SamplingParams(max_tokens=6, seed=seed, mode="deterministic")
                    samples += await sampler.sample(prompt, params)
                rewards = [sum("a" <= c <= "z" for c in s.text) / max(1, len(s.text)) for s in samples]
                datums = []
                for sample, advantage in zip(samples, grpo(rewards), strict=True):
                    ids, n = np.array([*prompt, *sample.tokens]), len(sample.tokens)
                    mask = np.arange(1, len(ids)) >= len(prompt)
                    logprobs = np.zeros(len(mask), np.float32)
                    logprobs[mask] = sample.logprobs
                    inputs = {
                        "target_tokens": ids[1:],
                        "weights": mask.astype(float),
                        "logprobs": logprobs,
                        "advantages": advantage * mask,
                    }
                    datums.append(Datum({"tokens": ids[:-1]}, inputs))
                    tokens += n
                step_datums.append(datums)
            async with session.step(update) as step:
                for datums in step_datums:
                    await step.forward_backward(datums, PPO())
                await (await step.apply(AdamParams(0.05, grad_clip_norm=1.0), scale=1 / tokens))
            await sampler.aclose()
        exported = home / "plain"
        exported.mkdir()
        files = (await session.export(str(exported))).files
    (run_directory,) = (home / "runs").iterdir()
    for name in files:
        assert (exported / name).read_bytes() == (run_directory / "export" / name).read_bytes(), name
    assert result.status == "completed"


@pytest.mark.parametrize("learner", ["streaming", "batch"])
async def test_without_staleness_the_order_of_arrival_changes_nothing(home, config, learner):
    found = set()
    for seconds, concurrent in (("0", 3), ("0.03", 3), ("0.01", 1)):
        values = {**config, "env_options": {"seconds": seconds}, "concurrent_groups": concurrent, "learner": learner}
        found.add(weights((await run(home, values))[0]))
    assert len(found) == 1


@pytest.mark.parametrize("normalize", ["none", "group", "running"])
@pytest.mark.parametrize("advantage", ["grpo", "gae"])
async def test_the_streaming_learner_gives_what_the_batch_learner_gives(home, config, normalize, advantage):
    values = {**config, "normalize": normalize, "advantage": advantage}
    losses = []
    for learner in ("streaming", "batch"):
        _, events = await run(home, {**values, "learner": learner})
        losses.append([event.loss for event in of(events, e.TrainingStep)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9, abs=1e-12)


async def test_a_backend_that_scales_by_a_constant_only_gives_the_same_update(home, config):
    exact = await run(home, {**config, "learner": "batch"})
    folded = await run(home, config, step_scale="constant")
    for one, other in zip(of(exact[1], e.TrainingStep), of(folded[1], e.TrainingStep), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-9, abs=1e-12)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)


async def test_several_passes_and_minibatches_are_real_optimizer_steps(home, config):
    result, events = await run(home, {**config, "ppo_epochs": 3, "minibatches": 2, "num_rollouts": 2})
    assert result.state.step.step == 12
    assert [event.epoch for event in of(events, e.PPOUpdated)] == [0, 1, 2] * 2
    passes = of(events, e.PPOUpdated)[:3]
    assert passes[0].kl_divergence < passes[2].kl_divergence
    whole = of(events, e.RLStep)[0]
    for metric in ("policy_loss", "entropy", "clip_fraction"):
        assert getattr(whole, metric) == pytest.approx(np.mean([getattr(event, metric) for event in passes]))


@pytest.mark.parametrize("advantage", ["grpo", "gae"])
async def test_the_measurements_of_an_update_are_those_of_its_rollouts(home, config, advantage):
    """What the events say, computed again from the trajectories that were trained."""
    seen = []

    @stage()
    async def look(rollouts: Batch[TrajectoryGroup]) -> None:
        seen.append(sorted(rollouts.groups, key=lambda group: group.ticket.index))

    values = {**config, "num_rollouts": 2, "advantage": advantage}
    values |= {"gamma": 1.0, "gae_lambda": 1.0, "normalize": "none"} if advantage == "gae" else {}
    _, events = await run(home, values, reinforcement.insert_after("log_rl_metrics", look))
    (built,) = of(events, e.EnvGroupBuilt)
    assert (built.group_size, built.groups_per_batch, built.env_type) == (4, 3, "letters")
    for i, groups in enumerate(seen):
        rewards_G_P = [[t.reward for t in group.trajectories] for group in groups]
        acted_G_P = [[t.actions for t in group.trajectories] for group in groups]
        each = zip(rewards_G_P, acted_G_P, strict=True)
        returns, relative = np.concatenate([[np.repeat(r, n), np.repeat(grpo(r), n)] for r, n in each], axis=1)

        rollouts, worth = of(events, e.RolloutComplete)[i], of(events, e.AdvantagesComputed)[i]
        assert (rollouts.rollout_index, rollouts.num_trajectories) == (i, 12)
        assert (rollouts.reward_mean, rollouts.reward_std) == pytest.approx((np.mean(rewards_G_P), np.std(rewards_G_P)))
        assert worth.num_steps == np.sum(acted_G_P)
        assert (worth.return_mean, worth.return_std) == pytest.approx((returns.mean(), returns.std()))
        update, step = of(events, e.PPOUpdated)[i], of(events, e.RLStep)[i]
        if advantage == "grpo":
            assert (worth.advantage_mean, worth.advantage_std) == pytest.approx((relative.mean(), relative.std()))
            assert update.value_loss == 0.0
        else:  # what an action was worth is what the value function was wrong by
            wrong = worth.advantage_std**2 + worth.advantage_mean**2
            assert update.value_loss == pytest.approx(wrong / 2, rel=1e-5)
        assert (update.epoch, update.batch_size, step.step) == (0, 12, i + 1)
        assert update.policy_loss == pytest.approx(-worth.advantage_mean, abs=1e-6)  # trained on its own samples
        assert update.clip_fraction == 0.0
        assert update.kl_divergence == pytest.approx(0.0, abs=1e-6)
        assert 0 < update.entropy <= np.log(300)  # nats per token, of whole distributions
        assert (step.reward_mean, step.policy_loss) == (rollouts.reward_mean, update.policy_loss)
        assert (step.entropy, step.clip_fraction) == (update.entropy, update.clip_fraction)
        assert step.sampler_mismatch < 1e-5


@pytest.mark.parametrize(
    "values",
    [
        {"advantage": "rloo"},
        {"advantage": "centred"},
        {"advantage": "maxrl"},
        {"advantage": "dr_grpo"},
        {"loss": "gspo"},
        {"loss": "cispo", "ppo_epochs": 2},
        {"loss": "decoupled_ppo", "max_staleness": 2, "ppo_epochs": 2},
        {"clip_epsilon": 0.2, "clip_epsilon_high": 0.28, "aggregation": "token_mean", "ppo_epochs": 2},
        {"importance_cap": 2.0, "max_staleness": 2},
        {"advantage": "gae", "value_clip": 0.2, "ppo_epochs": 2, "normalize": "batch", "entropy_coef": 0.01},
        {"kl_coef": 0.05, "kl_in": "loss", "dual_clip": 3.0},
        {"max_staleness": 1, "staleness_policy": "block"},
        {"max_staleness": 1, "staleness_policy": "discard"},
        {"max_staleness": 1, "staleness_policy": "cancel"},
    ],
    ids=str,
)
async def test_every_method_has_a_run_that_trains(home, config, values):
    result, events = await run(home, {**config, "env_options": {"seconds": "0.01"}, **values})
    assert result.status == "completed"
    assert len(of(events, e.RLStep)) == 5
    assert any(event.grad_norm > 0 for event in of(events, e.TrainingStep))
    assert all(np.isfinite(event.loss) for event in of(events, e.TrainingStep))
    if values.get("staleness_policy"):
        assert of(events, e.PipelineMeasured)[-1].staleness_max <= 1


async def test_crashing_environments_are_told_apart_from_bad_answers(home, config):
    values = {**config, "env_options": {"crash": "0.3"}, "num_rollouts": 8, "max_staleness": 1, "rollout_attempts": 3}
    result, events = await run(home, values)
    assert result.status == "completed"
    rollouts = of(events, e.RolloutComplete)
    assert [len(event.groups) for event in rollouts] == [3] * 8
    trained = [index for event in rollouts for index in event.groups]
    dropped = {event.index: event.reason for event in of(events, e.GroupDropped)}
    assert len(set(trained)) == 24
    assert not dropped.keys() & set(trained)
    assert set(dropped.values()) <= {"env_fault: RuntimeError"}
    for event in rollouts:
        assert event.num_trajectories == event.outcomes["scored"]
        assert sum(event.outcomes.values()) == 12
    ledger = of(events, e.PipelineMeasured)[-1].ledger
    assert ledger["drawn"] == 24 + sum(ledger["dropped"].values())


async def test_turns_are_sampled_with_the_newest_policy_and_their_holes_are_not_trained(home, config):
    _, events = await run(home, {**config, "env_options": {"turns": "3"}, "max_tokens": 4})
    assert of(events, e.RolloutComplete)[0].tokens_mean <= 12
    assert of(events, e.AdvantagesComputed)[0].num_steps == round(of(events, e.RolloutComplete)[0].tokens_mean * 12)


async def test_the_policy_is_measured_and_saved_when_an_update_reaches_the_number_of_steps(home, config):
    values = {**config, "ppo_epochs": 4, "eval_every": 6, "save_every": 8, "eval_at_start": True}
    _, events = await run(home, values)
    assert [(event.label, event.step) for event in of(events, e.PolicyEvaluated)] == [
        ("evaluate_before", 0),
        ("evaluate", 8),
        ("evaluate", 12),
        ("evaluate", 20),
        ("evaluate", 20),
    ]
    assert [event.step for event in of(events, e.TrainingCheckpoint)] == [8, 16, 20]


async def test_prometheus_is_told_of_rollouts_their_overlap_and_their_outcomes(home, config):
    adapters = {"training_client": "noop", "blob_store": "noop", "model_registry": "noop"}
    values = {**config, "env_options": {"crash": "0.3"}, "rollout_attempts": 1, "max_staleness": 1}
    async with Kitchen(adapters, home=home, metrics_port=0) as kitchen:
        handle = await kitchen.start("reinforcement", values)
        events = [record.event async for record in handle.events()]
        await handle.wait()
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{kitchen.metrics_port}/metrics")).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    found = {name.replace('workflow="reinforcement"', ""): float(number) for name, number in lines}
    rollouts, pipeline = of(events, e.RolloutComplete), of(events, e.PipelineMeasured)[-1]
    assert found["crucible_rl_updates_total{}"] == 5
    outcomes = sum((Counter(event.outcomes) for event in rollouts), Counter())
    assert {kind: found[f'crucible_rl_outcomes_total{{kind="{kind}",}}'] for kind in outcomes} == outcomes
    assert outcomes.keys() == {"scored", "env_fault"}
    assert found["crucible_rl_trajectories_total{}"] == outcomes["scored"]
    for name in ("queue_depth", "staleness_mean", "staleness_max", "overlap_efficiency", "learner_idle_share", "waste"):
        assert found[f"crucible_rl_{name}{{}}"] == getattr(pipeline, name)
    members = sum(rollouts[-1].outcomes.values())
    assert found["crucible_rl_environment_seconds{}"] == pytest.approx(rollouts[-1].env_seconds / members)
    assert found["crucible_rl_group_seconds_count{}"] == 15
    assert found["crucible_rl_group_seconds_sum{}"] == pytest.approx(sum(sum(event.seconds) for event in rollouts))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_tensorboard_plots_rewards_overlap_and_evaluations_over_the_updates(home, config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    adapters = {"training_client": "noop", "blob_store": "noop", "model_registry": "noop"}
    async with Kitchen(adapters, home=home, sinks=[TensorBoardSink(home / "curves")]) as kitchen:
        handle = await kitchen.start("reinforcement", config)
        events = [record.event async for record in handle.events()]
        await handle.wait()
    (directory,) = (home / "curves").iterdir()
    found = EventAccumulator(str(directory))
    found.Reload()
    for tag, kind in (("rl/reward_mean", e.RLStep), ("rl/overlap_efficiency", e.PipelineMeasured)):
        wanted = [(event.step, getattr(event, tag[3:])) for event in of(events, kind)]
        assert [(s.step, s.value) for s in found.Scalars(tag)] == [(i, pytest.approx(value)) for i, value in wanted]
    (evaluated,) = of(events, e.PolicyEvaluated)
    assert [s.value for s in found.Scalars("eval/reward_mean")] == [pytest.approx(evaluated.reward_mean)]


async def test_minibatches_of_observations_are_made_of_single_steps(home):
    pytest.importorskip("gymnasium")
    values = {"model": "mlp", "lora_rank": 0, "env": "gymnasium:CartPole-v1", "group_size": 4, "groups_per_batch": 2}
    values |= {"num_rollouts": 2, "ppo_epochs": 2, "minibatches": 5, "eval_size": 2, "learning_rate": 1e-3}
    async with Kitchen(home=home) as kitchen:
        handle = await kitchen.start("reinforcement", values)
        events = [record.event async for record in handle.events()]
        result = await handle.wait()
    assert result.state.step.step == 20
    steps = of(events, e.AdvantagesComputed)[-1].num_steps
    assert abs(result.state.step.tokens - steps / 5) < 1
    assert result.state.ppo_metrics["value_loss"] > 0
    assert of(events, e.RolloutComplete)[0].num_trajectories == 8
    assert 0 <= result.state.ppo_metrics["sampler_mismatch"] < 1e-5


@pytest.mark.parametrize(
    ("values", "repeats", "why"),
    [
        ({}, True, "bit for bit"),
        ({"max_staleness": 1}, False, "max_staleness=1"),
        ({"sampling": "fast"}, False, "sampling=deterministic"),
    ],
)
def test_the_manifest_says_whether_a_run_can_be_repeated(home, config, values, repeats, why):
    result = Kitchen({"training_client": "noop"}, home=home).check("reinforcement", {**config, **values})
    assert result.manifest["reproducible"] is repeats
    assert why in result.manifest["reproducible_because"]


@pytest.mark.parametrize(
    ("values", "capabilities", "learner", "why"),
    [
        ({}, {}, "streaming", "that group alone"),
        ({"ppo_epochs": 2}, {}, "batch", "ppo_epochs"),
        ({"learner": "batch"}, {}, "batch", "learner=batch"),
        ({}, {"step_scale": "constant"}, "batch", "cannot scale a step"),
    ],
)
def test_the_manifest_says_which_learner_was_chosen_and_why(home, config, values, capabilities, learner, why):
    kitchen = Kitchen({"training_client": ("noop", {"capabilities": capabilities})}, home=home)
    decided = kitchen.check("reinforcement", {**config, **values}).manifest["decided"]
    assert decided["learner"] == learner
    assert why in decided["learner_because"]


async def test_other_problems_or_another_learner_are_refused_when_a_run_is_resumed(home, config):
    failing = with_faults(NoopTrainingClient(), fails("apply", TransientBackendError("lost"), call=4))
    file = home / "problems.jsonl"
    file.write_text(json.dumps({"problem": "1+1", "answer": "2"}))
    config, allowed = {**config, "env": f"math:{file}", "save_every": 1}, ["training_client"]
    async with Kitchen({"training_client": "noop"}, home=home) as kitchen:
        handle = await kitchen.start("reinforcement", config, adapters={"training_client": failing})
        with pytest.raises(TransientBackendError):
            await handle.wait()
        collecting = with_faults(NoopTrainingClient(capabilities={"step_scale": "constant"}))
        with pytest.raises(RunChanged, match="learner was 'streaming', is 'batch'"):
            await kitchen.resume(handle.id, adapters={"training_client": collecting}, allow_changed=allowed)
        client = {"training_client": with_faults(NoopTrainingClient())}
        file.write_text(json.dumps({"problem": "1+2", "answer": "3"}))
        with pytest.raises(RunChanged, match="environment was"):
            await kitchen.resume(handle.id, adapters=client, allow_changed=allowed)
        allowed.append("environment")
        assert (await kitchen.resume(handle.id, adapters=client, allow_changed=allowed)).status == "completed"


# -- every key --------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "seed": 1,
    "lora_rank": 2,
    "env_options": {"problems": "3"},
    "group_size": 5,
    "groups_per_batch": 2,
    "num_rollouts": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "max_tokens": 3,
    "max_turns": [1, {"env_options": {"turns": "2"}}],
    "max_staleness": 2,
    "shuffle": False,
    "advantage": "gae",
    "advantage_std": "rllm",
    "gamma": [0.5, {"advantage": "gae"}],
    "gae_lambda": [0.5, {"advantage": "gae"}],
    "value_lambda": [0.5, {"advantage": "gae"}],
    "value_coef": [0.01, {"advantage": "gae"}],
    "value_clip": [1e-6, {"advantage": "gae", "ppo_epochs": 3}],
    "normalize_values": [True, {"advantage": "gae"}],
    "normalize": "batch",
    "loss": ["importance_sampling", {"ppo_epochs": 4, "learning_rate": 0.5}],
    "clip_epsilon": [0.001, {"ppo_epochs": 3}],
    "clip_epsilon_high": [0.001, {"ppo_epochs": 3}],
    "dual_clip": [1.0001, {"ppo_epochs": 4, "learning_rate": 0.5}],
    "ratio_min": [0.999, {"loss": "cispo", "ppo_epochs": 3}],
    "ratio_max": [1.001, {"loss": "cispo", "ppo_epochs": 3}],
    "behaviour_cap": [1e-6, {"loss": "decoupled_ppo"}],
    "aggregation": "sequence_mean",
    "importance_cap": 0.5,
    "kl_coef": 0.5,
    "kl_in": ["loss", {"kl_coef": 0.5}],
    "entropy_coef": 0.1,
    "ppo_epochs": 2,
    "minibatches": 2,
    "learning_rate": 0.01,
    "lr_schedule": "linear",
    "lr_end": [0.5, {"lr_schedule": "linear"}],
    "lr_power": [3.0, {"lr_schedule": "polynomial"}],
    "warmup": 3,
    "beta1": 0.1,
    "beta2": 0.5,
    "eps": 0.1,
    "weight_decay": 0.5,
    "grad_clip_norm": 0.01,
    "lora_alpha": [64.0, {"lora_rank": 2}],
}
"""A value for each key that decides what is learned, and the settings it needs; each must change the weights."""

OTHERWISE = {
    "model": "another model",
    "env": "another environment",
    "stage_timeout": "how long stages may take",
    "grace": "how long closing may take",
    "durability": "when records are on disk",
    "on_failure": "what follows a failure",
    "stall_after": "when a run counts as stalled",
    "on_stall": "what follows then",
    "lora_dropout": "the noop model has no dropout",
    "lora_targets": "the noop model has one layer",
    "chat_template": "the noop model has none",
    "template": "the noop tokenizer has no chat template",
    "horizon": "the noop model takes no observations: see tests/rl/test_standing.py",
    "concurrent_groups": "see the test of the order of arrival",
    "staleness_policy": "see tests/rl/test_pipeline.py",
    "sampling": "the noop sampler is always deterministic",
    "rollout_timeout": "see tests/rl/test_rollout.py",
    "rollout_attempts": "see tests/rl/test_rollout.py",
    "min_group_size": "see tests/rl/test_rollout.py",
    "learner": "gives the same, see above",
    "judge": "see test_scored.py",
    "reward_model": "see test_scored.py",
    "own_reward": "see test_scored.py",
    "eval_size": "measures only",
    "eval_every": "measures only",
    "eval_at_start": "measures only",
    "save_every": "saves only",
    "keep_last": "see tests/workflow/test_resume.py",
    "keep_every": "see tests/workflow/test_resume.py",
    "keep_best": "see tests/workflow/test_resume.py",
    "register_as": "names only",
    "parent_model": "lineage only",
}
"""Every other key, and why it has no place above."""


def test_every_key_is_walked_over():
    assert sorted(CHANGES.keys() | OTHERWISE.keys()) == sorted(ReinforcementConfig.model_fields)


@pytest.mark.parametrize("key", sorted(CHANGES))
async def test_every_key_changes_the_numbers(home, config, key):
    change = CHANGES[key]
    value, needs = change if isinstance(change, list) else (change, {})
    base = {**config, **needs}
    before, after = await run(home, base), await run(home, {**base, key: value})
    assert weights(before[0]) != weights(after[0])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "capabilities", "error", "says"),
    [
        ({"env": "lettrs"}, {}, WorkflowError, "did you mean 'letters'"),
        ({"env": "letters:x"}, {}, WorkflowError, "has no tasks"),
        ({"env_options": {"colour": "red"}}, {}, WorkflowError, "has no option 'colour'"),
        ({"group_size": 1}, {}, WorkflowError, "a group of one has nobody to compare"),
        ({"min_group_size": 1}, {}, WorkflowError, "a group of one has nobody to compare"),
        ({"min_group_size": 9}, {}, WorkflowError, "more than group_size"),
        ({"minibatches": 50}, {}, WorkflowError, "50 minibatches are more"),
        ({"advantage": "gae"}, {"value_head": False}, WorkflowError, "write advantage=grpo"),
        ({"kl_coef": 0.1}, {"reference": False}, WorkflowError, "frozen reference"),
        ({}, {"sampling": False}, WorkflowError, "cannot sample"),
        ({"learner": "streaming"}, {"step_scale": "constant"}, WorkflowError, "use learner=batch"),
        ({}, {"custom_loss": "refused"}, WorkflowError, "takes none of ours"),
        ({"model": "mlp"}, {}, WorkflowError, "no policy over observations"),
        ({"epochs": 3}, {}, ConfigError, "unknown config key 'epochs'"),
        ({"group_sise": 3}, {}, ConfigError, "did you mean 'group_size'"),
    ],
)
async def test_what_cannot_work_is_refused_before_anything_runs(home, config, values, capabilities, error, says):
    with pytest.raises(error) as caught:
        await run(home, {**config, **values}, **capabilities)
    assert says in f"{caught.value} {caught.value.hint}"
    assert not (home / "runs").exists()


async def test_an_environment_that_always_crashes_ends_the_run_with_the_reason(home, config):
    with pytest.raises(CrucibleError, match="in a row came to nothing, the last because: env_fault: RuntimeError"):
        await run(home, {**config, "env_options": {"crash": "1"}})


async def test_the_report_has_a_plot_of_every_curve(home, config):
    from xml.etree import ElementTree

    result, _ = await run(home, config)
    assert {artifact.name for artifact in result.artifacts if artifact.kind == "report"} == {"report.svg", "report.md"}
    (directory,) = (home / "runs").iterdir()
    root = ElementTree.parse(directory / "report.svg").getroot()
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert [len(line.get("points").split()) for line in lines] == [5] * 5
    assert "![curves](report.svg)" in (directory / "report.md").read_text()
    assert [point[0] for point in result.state.curves.points][-1] == result.state.rollout_metrics["reward_mean"]


async def test_the_readme_s_keys_as_upstream_has_them_run_and_give_real_numbers(home):
    keys = {
        "model": "noop",
        "env": "letters",
        "group_size": 4,
        "groups_per_batch": 3,
        "num_rollouts": 2,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_epsilon": 0.2,
        "ppo_epochs": 4,
        "learning_rate": 1.0e-5,
    }
    result, _ = await run(home, keys)
    assert result.state.rollout_metrics["num_trajectories"] == 12
    assert result.state.step.step == 8
    assert result.state.ppo_metrics["entropy"] > 1
    assert result.state.ppo_metrics["value_loss"] > 0


def test_curves_are_thinned_and_never_grow_beyond_their_bound():
    curves = Curves()
    for update in range(1, 10_001):
        curves = curves.with_point(update, (float(update),))
    assert len(curves.points) <= 2000
    assert all(point == (float(update),) for update, point in zip(curves.updates, curves.points, strict=True))
    assert curves.updates[-1] == 10_000


# -- what users see ---------------------------------------------------------------------------------------------------


def test_the_workflow_is_described_and_its_config_is_json():
    assert Registry.discover().target("reinforcement") is reinforcement
    values = {"model": "tiny", "env": "sums"}
    dumped = json.loads(build_config(ReinforcementConfig, values).model_dump_json())
    assert build_config(ReinforcementConfig, values | {"group_size": dumped["group_size"]}).advantage == "gae"
