"""Real processes, killed with SIGKILL at seeded moments and resumed, against one that nobody disturbed."""

import signal
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.testing.chaos import Chaos, Outcome

ONE_THREAD = ("--adapter", "training_client=torch,threads=1")
SUPERVISED = (
    "supervised",
    "model=tiny",
    "dataset=sums",
    "max_steps=30",
    "batch_size=16",
    "eval_size=8",
    "save_every=4",
)
PREFERENCE = ("preference", "model=tiny", "dataset=sums", "max_steps=12", "batch_size=8", "eval_size=8", "save_every=3")
DISTILLATION = (
    "distillation",
    "model=tiny",
    "dataset=sums",
    "sampling=deterministic",
    "max_steps=10",
    "batch_size=4",
    "eval_size=4",
    "save_every=3",
    "teacher_training.max_steps=10",
    "teacher_training.batch_size=16",
    "teacher_training.save_every=3",
)
REINFORCEMENT = (
    "reinforcement",
    "model=tiny",
    "env=sums",
    "advantage=grpo",
    "group_size=2",
    "groups_per_batch=3",
    "num_rollouts=12",
    "max_tokens=4",
    "eval_size=4",
    "save_every=3",
    "sampling=deterministic",
)

CONTINUED = (
    "reinforcement",
    "model=mlp",
    "lora_rank=0",
    "env=gymnasium:CartPole-v1",
    "env_options.isolation=none",
    "group_size=3",
    "groups_per_batch=1",
    "horizon=15",
    "num_rollouts=12",
    "ppo_epochs=2",
    "minibatches=2",
    "eval_size=2",
    "save_every=12",
)

BRANCHES = '''
"""Two models trained side by side, each in a session of its own."""

from crucible_kitchen import AdamParams, Datum, Loop, ModelConfig, Parallel, Run
from crucible_kitchen import TrainingClient, TrainingSession, Workflow, stage
from crucible_kitchen.events import TrainingStep
from crucible_kitchen.types import SessionSpec


def branch(name, text):
    async def open_session(training_client: TrainingClient, config: ModelConfig, run: Run):
        async with training_client.open_session(SessionSpec(config.model, None, config.seed, str(run.directory))) as s:
            yield s

    async def learn(run, session):
        tokens = [*session.tokenizer.encode(text), session.tokenizer.eos_id]
        index = run.turn(f"{name}_turn")
        async with session.step(index) as step:
            result = await step.forward_backward([Datum.from_tokens(tokens, [1.0] * len(tokens))])
            applied = await step.apply(AdamParams(learning_rate=3e-3), scale=1 / len(text))
            await applied
            loss = (await result).loss
        run.emit(TrainingStep(
            step=index + (1000 if name == "b" else 0), epoch=0, loss=loss, lr=3e-3, tokens_per_sec=0.0, grad_norm=0.0
        ))
        if index % 3 == 2:
            run.checkpoint()
        return loss

    if name == "a":
        async def train(a_session: TrainingSession, run: Run) -> float:
            return await learn(run, a_session)
    else:
        async def train(b_session: TrainingSession, run: Run) -> float:
            return await learn(run, b_session)

    return [
        stage(writes=f"{name}_session", name=f"{name}_open")(open_session),
        Loop(f"{name}_turn", lambda: range(12), stage(writes=f"{name}_loss", name=f"{name}_train")(train)),
    ]


@stage(writes="losses")
async def both(a_loss: float = 0.0, b_loss: float = 0.0) -> list[float]:
    return [a_loss, b_loss]


both_branches = Parallel(branch("a", "one and one"), branch("b", "two by two"))
branches = Workflow("branches", both_branches, both, config=ModelConfig)
'''


def compared(
    arguments: tuple[str, ...],
    tmp_path: Path,
    seeds: range,
    kills: int,
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,),
    **options: Any,
) -> None:
    """Disturb a run once per seed; each must become what the undisturbed one is."""
    calm = Chaos(arguments, tmp_path / "calm", tmp_path, **options).undisturbed()
    for seed in seeds:
        wild = Chaos(arguments, tmp_path / f"wild{seed}", tmp_path, **options).disturbed(seed, kills, signals)
        assert_same(wild, calm, seed)


def assert_same(wild: Outcome, calm: Outcome, seed: int) -> None:
    assert wild.losses == calm.losses, f"seed {seed}: other losses after {wild.kills} kills"
    assert wild.weights == calm.weights, f"seed {seed}: other weights after {wild.kills} kills"
    for name in ("eval_results", "losses"):
        assert wild.result["state"].get(name) == calm.result["state"].get(name), f"seed {seed}: another {name}"


@pytest.fixture
def branches(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "branches.py").write_text(BRANCHES, encoding="utf-8")
    return ("branches.py:branches", "model=tiny", *ONE_THREAD)


def test_a_run_killed_five_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    compared((*SUPERVISED, *ONE_THREAD), tmp_path, range(1), kills=5)


@pytest.mark.e2e
def test_a_supervised_run_killed_twenty_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    compared((*SUPERVISED, *ONE_THREAD), tmp_path, range(1, 5), kills=5)


@pytest.mark.e2e
def test_branches_that_own_their_sessions_end_with_the_same_bits(tmp_path: Path, branches: tuple[str, ...]) -> None:
    compared(branches, tmp_path, range(2), kills=5)


@pytest.mark.e2e
def test_a_preference_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    compared((*PREFERENCE, *ONE_THREAD), tmp_path, range(2), kills=5)


@pytest.mark.e2e
def test_a_distillation_run_and_the_training_of_its_teacher_end_with_the_same_bits(tmp_path: Path) -> None:
    compared((*DISTILLATION, *ONE_THREAD), tmp_path, range(1), kills=5)


@pytest.mark.e2e
def test_a_reinforcement_run_in_turn_ends_with_the_same_bits(tmp_path: Path) -> None:
    compared((*REINFORCEMENT, *ONE_THREAD), tmp_path, range(1), kills=4)


@pytest.mark.e2e
def test_a_run_in_an_environment_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    compared((*CONTINUED, *ONE_THREAD), tmp_path, range(1), kills=4)


def overlapped(tmp_path: Path, seeds: range, kills: int) -> None:
    """Disturb a run whose rollouts overlap with learning: each group is trained exactly once, and none is lost."""
    for seed in seeds:
        arguments = (*REINFORCEMENT, "max_staleness=2", *ONE_THREAD)
        wild = Chaos(arguments, tmp_path / f"wild{seed}", tmp_path).disturbed(seed, kills)
        assert sorted(wild.groups) == list(range(12)), f"seed {seed}: another number of updates"
        trained = sorted(index for update in wild.groups.values() for index in update)
        assert trained == list(range(36)), f"seed {seed}: groups lost or trained twice after {wild.kills} kills"
        assert (wild.ledger["drawn"], wild.ledger["trained"], wild.ledger["dropped"]) == (36, 36, {}), f"seed {seed}"


@pytest.mark.e2e
def test_a_reinforcement_run_that_overlaps_keeps_the_law_of_its_ledger(tmp_path: Path) -> None:
    overlapped(tmp_path, range(1), kills=4)


@pytest.mark.chaos
@pytest.mark.parametrize("k", [0, 2])
def test_a_hundred_kills_of_reinforcement_runs_lose_nothing(tmp_path: Path, k: int) -> None:
    if k:
        overlapped(tmp_path, range(100, 120), kills=5)
    else:
        compared((*REINFORCEMENT, *ONE_THREAD), tmp_path, range(100, 120), kills=5)


@pytest.mark.chaos
def test_kills_of_a_run_in_an_environment_that_goes_on_change_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    compared((*CONTINUED, *ONE_THREAD), tmp_path, range(100, 105), kills=5)


ANY_SIGNAL = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP)


@pytest.mark.e2e
def test_a_run_that_is_drained_cancelled_stopped_and_killed_by_turns_ends_with_the_same_bits(tmp_path: Path) -> None:
    compared((*SUPERVISED, *ONE_THREAD), tmp_path, range(1), kills=6, signals=ANY_SIGNAL)


@pytest.mark.chaos
def test_a_hundred_signals_of_every_kind_change_nothing(tmp_path: Path) -> None:
    compared((*SUPERVISED, *ONE_THREAD), tmp_path, range(300, 320), kills=5, signals=ANY_SIGNAL)


@pytest.mark.chaos
def test_two_hundred_kills_change_nothing(tmp_path: Path) -> None:
    compared((*SUPERVISED, *ONE_THREAD), tmp_path, range(100, 140), kills=5)
