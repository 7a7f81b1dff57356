"""CartPole: the whole loop beside Stable-Baselines3's PPO with the same hyperparameters and number of environments.

Both learn ``CartPole-v1`` with eight environments, two hidden layers of 64, GAE(0.98, 0.8), ten epochs of PPO clip 0.2,
Adam from 1e-3 linearly to 0, gradients clipped to norm 0.5; an update is made of 256 steps of each environment, in 8
minibatches. They differ in what values learn: sums of rewards here, in units of the first update's returns, and returns
by GAE's lambda there, in rewards; and advantages are normalised over the update here, over the minibatch there.
*Solved* is the first update after which the last forty episodes of training have a mean return of 475 or more. Medians
over the seeds, one thread for torch on both sides. Stable-Baselines3 is looked for in ``--peers``, which ``make peers``
fills; without it, that is said.

    python benchmarks/bench_cartpole.py [--seeds 5] [--updates 40] [--peers .peers]
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import anyio
from _table import machine, print_table

from crucible_kitchen import Kitchen
from crucible_kitchen.events import EnvGroupBuilt, RolloutComplete, TrainingStep

SOLVED = 475.0
EPISODES = 40
ENVIRONMENTS = 8
HORIZON = 256
UPDATE = ENVIRONMENTS * HORIZON
CONFIG: dict[str, Any] = {
    "model": "mlp",
    "env": "gymnasium:CartPole-v1",
    "env_options": {"isolation": "none"},  # as there: in the same process
    "lora_rank": 0,
    "group_size": ENVIRONMENTS,
    "min_group_size": ENVIRONMENTS,
    "groups_per_batch": 1,
    "horizon": HORIZON,
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "ppo_epochs": 10,
    "minibatches": 8,
    "learning_rate": 1e-3,
    "beta2": 0.999,
    "eps": 1e-5,
    "grad_clip_norm": 0.5,
    "value_coef": 1.0,  # there 0.5, without the half that the value loss has here
    "normalize": "batch",
    "eval_size": 1,
}


@dataclass
class Learned:
    """Environment steps made, seconds they took with all learning, and steps until it was solved (0: never)."""

    steps: int = 0
    seconds: float = 0.0
    solved: int = 0


async def ours(seed: int, updates: int) -> Learned:
    """Run the workflow for so many updates."""
    learned, returns = Learned(), [0.0] * EPISODES
    with tempfile.TemporaryDirectory() as home:
        async with Kitchen(home=home) as kitchen:
            run = await kitchen.start("reinforcement", {**CONFIG, "num_rollouts": updates, "seed": seed})
            async for record in run.events():
                if isinstance(record.event, EnvGroupBuilt):
                    began = time.perf_counter()
                if isinstance(record.event, RolloutComplete):
                    learned.steps += UPDATE
                    returns = [*returns, *[record.event.reward_mean] * record.event.num_ended][-EPISODES:]
                    if not learned.solved and statistics.mean(returns) >= SOLVED:
                        learned.solved = learned.steps
                if isinstance(record.event, TrainingStep):
                    learned.seconds = time.perf_counter() - began
    return learned


def theirs(seed: int, updates: int) -> Learned:
    """Let Stable-Baselines3 learn for so many updates."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    learned = Learned()

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            recent = [episode["r"] for episode in self.model.ep_info_buffer or ()]
            if not learned.solved and len(recent) == EPISODES and statistics.mean(recent) >= SOLVED:
                learned.solved = self.num_timesteps

    torch.set_num_threads(1)
    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=ENVIRONMENTS, seed=seed),
        n_steps=HORIZON,
        batch_size=256,
        n_epochs=10,
        gamma=0.98,
        gae_lambda=0.8,
        clip_range=0.2,
        learning_rate=lambda left: 1e-3 * left,
        ent_coef=0.0,
        stats_window_size=EPISODES,
        seed=seed,
        device="cpu",
    )
    began = time.perf_counter()
    model.learn(updates * UPDATE, callback=Watch())
    learned.seconds, learned.steps = time.perf_counter() - began, model.num_timesteps
    return learned


def row(name: str, runs: list[Learned]) -> list[object]:
    """Return a table's line: medians over the seeds."""
    speed = statistics.median(run.steps / run.seconds for run in runs)
    never = max(run.steps for run in runs) + 1  # a seed that never solved it is the slowest
    solved = statistics.median(run.solved or never for run in runs)
    return [name, speed, f"{solved:,.0f}" if solved < never else "not solved", sum(bool(run.solved) for run in runs)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--peers", default=".peers")
    args = parser.parse_args()
    sys.path.append(args.peers)
    runs: dict[str, list[Learned]] = {"crucible-kitchen": [], "stable-baselines3": []}
    for seed in range(args.seeds):
        runs["crucible-kitchen"].append(anyio.run(ours, seed, args.updates))
        try:
            runs["stable-baselines3"].append(theirs(seed, args.updates))
        except ImportError as error:
            print(f"Stable-Baselines3 is absent ({error}): run `make peers` first\n", file=sys.stderr)
        for name, found in runs.items():
            if found:
                print(f"seed {seed}, {name}: {found[-1]}", file=sys.stderr)
    print_table(
        f"CartPole-v1, {args.seeds} seeds, {args.updates * UPDATE:,} steps each ({machine()})",
        ["who", "environment steps/s, learning included", "steps until solved", "seeds that solved it"],
        [row(name, found) for name, found in runs.items() if found],
    )


if __name__ == "__main__":
    main()
