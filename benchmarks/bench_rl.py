"""How rollouts and learning overlap, and what the orchestration of a group costs.

Four tables:

- overlap efficiency ``T_ideal / T_step`` under the standard load (8 groups per batch, 8 at a time, log-normal rollouts
  of 50 ms with sigma 1, a learner of 50 ms, 150 steps), per staleness K. The greatest of 1,200 log-normal times decide
  how a run ends, so one seed says little: means over the seeds 0, 1, 2, ... Rollouts sleep for real, beside the same
  seeds and many more in simulated time, a plain loop of ``anyio`` tasks without overlap, and workers without a learner;
- the strict policies with their price, in simulated time;
- a group of 8 rollouts through actors, queue, gate and ledgers, beside a bare task group of 8 empty children;
- 1,000 groups at a time in one process;
- memory while 10,000 groups go through.

    python benchmarks/bench_rl.py [--steps 150] [--seeds 5] [--simulated 40] [--groups 2000] [--many 10000]
"""

import argparse
import asyncio
import gc
import math
import random
import selectors
import statistics
import time
import tracemalloc
from collections import Counter
from functools import partial

import anyio
import anyio.lowlevel
import numpy as np
from _table import machine, print_table

from crucible_kitchen.config import build_config
from crucible_kitchen.ports.environment import Action, Observation, Transition
from crucible_kitchen.rl.pipeline import Rollouts
from crucible_kitchen.rl.plan import PipelinePlan
from crucible_kitchen.rl.policy import PublishedPolicy
from crucible_kitchen.rl.rehearsal import Latencies, RehearsalConfig, rehearse
from crucible_kitchen.rl.rollout import Roller, RolloutRules
from crucible_kitchen.rl.trajectories import Ticket
from crucible_kitchen.rl.virtual import run_virtually
from crucible_kitchen.types import Message, Sampled

BATCH, SIZE, MEAN, SIGMA, LEARN = 8, 8, 0.05, 1.0, 0.05


class Group:
    """A group that is nothing but its time and its version."""

    unusable, carried, length = None, None, 1

    def __init__(self, ticket, version, seconds):
        self.ticket, self.version, self.seconds = ticket, version, seconds

    def versions(self):
        return np.array((self.version,))


def load(steps, seed=0):
    """Return the times of all rollouts of a run."""
    rng = random.Random(seed)
    mu = math.log(MEAN) - SIGMA**2 / 2
    return [rng.lognormvariate(mu, SIGMA) for _ in range(steps * BATCH)]


class Sleeper:
    """Sleeps whose sum is exact: what a sleep ends late, which is the machine's doing, the next one makes up for."""

    def __init__(self):
        self.late = 0.0

    async def sleep(self, seconds):
        began = anyio.current_time()
        await anyio.sleep(max(0.0, seconds - self.late))
        self.late += anyio.current_time() - began - seconds


async def overlapped(k, seconds):
    """Return the wall clock, the groups that were given up, and the ages of those that were trained."""
    rollouts = Rollouts(PipelinePlan(len(seconds) // BATCH, BATCH, k, workers=BATCH), order=lambda i: i)
    learner, slots = Sleeper(), [Sleeper() for _ in range(BATCH)]

    async def produce(ticket):
        version, slot = rollouts.version, slots.pop()
        await slot.sleep(seconds[ticket.index])
        slots.append(slot)
        return Group(ticket, version, seconds[ticket.index])

    began = anyio.current_time()
    async with rollouts.running(produce):
        async for batch in rollouts:
            async for _ in batch:
                await learner.sleep(LEARN / BATCH)
            batch.trained()
        wall = anyio.current_time() - began
    return wall, rollouts.ledger.dropped.total(), rollouts.measured.staleness


async def in_turn(seconds):
    """Roll out a batch concurrently, then learn from it: what a loop without overlap does."""
    learner, began = Sleeper(), anyio.current_time()
    for first in range(0, len(seconds), BATCH):
        async with anyio.create_task_group() as group:
            for each in seconds[first : first + BATCH]:
                group.start_soon(anyio.sleep, each)
        await learner.sleep(LEARN)
    return anyio.current_time() - began, 0, Counter((0,))


async def rollouts_alone(seconds):
    """Let eight workers roll out and nobody learn: the limit of this load, with its end and this machine's timers."""
    left = iter(seconds)

    async def work():
        slot = Sleeper()
        for each in left:
            await slot.sleep(each)

    began = anyio.current_time()
    async with anyio.create_task_group() as group:
        for _ in range(BATCH):
            group.start_soon(work)
    return anyio.current_time() - began, 0, Counter((0,))


LOOPS = {
    "rollouts and learning in turn": (in_turn, None),
    "rollouts without learning": (rollouts_alone, None),
    "K = 0": (partial(overlapped, 0), 0.29),
    "K = 1": (partial(overlapped, 1), 0.88),
    "K = 2": (partial(overlapped, 2), 0.93),
    "K = 4": (partial(overlapped, 4), 0.96),
}


def efficiency(wall, seconds):
    steps = len(seconds) / BATCH
    return max(LEARN, statistics.mean(seconds)) * steps / wall


def really(loop, seconds):
    """Run in real time, on timers of a microsecond: those of epoll, of a millisecond, are no part of the load."""
    precise = {"loop_factory": lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())}
    return anyio.run(loop, seconds, backend_options=precise)


def simulated(loop, steps, seeds):
    """Return the efficiency of each seed in simulated time."""
    loads = [load(steps, seed) for seed in range(seeds)]
    return [efficiency(run_virtually(partial(loop, each))[0], each) for each in loads]


def overlap(steps, seeds, many):
    found = {what: [] for what in LOOPS}
    ages = {what: Counter() for what in LOOPS}
    given_up = dict.fromkeys(LOOPS, 0)
    for seed in range(seeds):  # interleaved: what else the machine does meets all of them
        seconds = load(steps, seed)
        for what, (loop, _) in LOOPS.items():
            wall, dropped, aged = really(loop, seconds)
            found[what].append(efficiency(wall, seconds))
            ages[what].update(aged)
            given_up[what] += dropped
    rows = []
    for what, (loop, target) in LOOPS.items():
        mean, virtual = statistics.mean(found[what]), simulated(loop, steps, max(seeds, many))
        rows.append(
            (
                what,
                f"{mean:.3f}",
                f"{statistics.mean(virtual[:seeds]):.3f}",
                f"{statistics.mean(virtual):.3f} ({min(virtual):.2f} to {max(virtual):.2f})",
                f"{given_up[what] / (steps * BATCH * seeds):.0%}",
                f"{sum(age * n for age, n in ages[what].items()) / ages[what].total():.2f} / {max(ages[what])}",
                "" if target is None else f">= {target:.2f}",
                "" if target is None else "yes" if mean >= target and not given_up[what] else "NO",
            )
        )
    print_table(
        f"Overlap efficiency, {steps} steps, means over {seeds} seeds",
        ("", "real time", "simulated", f"{max(seeds, many)} seeds, simulated", "waste", "age / most", "target", "held"),
        rows,
    )


def policies(steps):
    rows = []
    for policy in ("aggregate", "block", "discard", "cancel"):
        row = [policy]
        for k in (1, 2, 4):
            values = {"env": "sums", "max_staleness": k, "staleness_policy": policy, "num_rollouts": steps}
            found = rehearse(
                build_config(RehearsalConfig, values | {"groups_per_batch": BATCH}),
                Latencies(rollout_mean=MEAN, rollout_sigma=SIGMA, update=LEARN),
            )
            row.append(f"{LEARN / found.step_seconds:.2f} / {found.waste:.0%} / {max(found.staleness)}")
        rows.append(tuple(row))
    print_table(
        f"Efficiency / waste / oldest by policy, {steps} simulated steps", ("policy", "K = 1", "K = 2", "K = 4"), rows
    )


class Instant:
    """A source, a group, an environment, a tokenizer and a sampler that take no time."""

    space, name, environments, prefix_ids = None, "instant", None, ()
    done = Transition(1.0, terminated=True)
    prompt = Observation((Message("user", "q"),))
    sample_ = Sampled(np.array([1, 2]), np.array([-1.0, -1.0], np.float32), "x", "stop")

    async def open(self, _problem, size, _seed):
        self.environments = [self] * size
        return self

    async def group_rewards(self, episodes):
        return [0.0] * len(episodes)

    async def reset(self):
        return self.prompt

    async def step(self, _action: Action):
        return self.done

    def encode(self, _text):
        return [3]

    async def sample(self, _prompt, _params, _n=1):
        await anyio.lowlevel.checkpoint()
        return [self.sample_]

    async def aclose(self):
        pass


async def bare(groups):
    began = time.perf_counter()
    for _ in range(groups):
        async with anyio.create_task_group() as group:
            for _ in range(SIZE):
                group.start_soon(anyio.lowlevel.checkpoint)
    return (time.perf_counter() - began) / groups


async def through(groups, *, empty=False, workers=1, k=0):
    instant = Instant()
    roller = Roller(instant, PublishedPolicy(instant), RolloutRules(SIZE), tokenizer=instant)
    rollouts = Rollouts(PipelinePlan(groups // BATCH, BATCH, k, workers=workers), order=lambda i: i)

    async def nothing(ticket: Ticket):
        version = rollouts.version
        async with anyio.create_task_group() as group:
            for _ in range(SIZE):
                group.start_soon(anyio.lowlevel.checkpoint)
        return Group(ticket, version, 0.0)

    began = time.perf_counter()
    async with rollouts.running(nothing if empty else roller):
        async for batch in rollouts:
            async for _ in batch:
                pass
            batch.trained()
        return (time.perf_counter() - began) / groups


def orchestration(groups):
    ratios = {True: [], False: []}
    least = math.inf
    for _ in range(5):
        floor = anyio.run(bare, groups // 5)
        least = min(least, floor)
        for empty in ratios:
            gc.collect()
            ratios[empty].append(
                anyio.run(lambda empty=empty: through(groups // 5 // BATCH * BATCH, empty=empty)) / floor
            )
    ours = statistics.median(ratios[True])
    rows = [
        ("a bare task group of 8 empty children", f"{least * 1e6:.0f}", "1.00", "", ""),
        ("the same through actors, queue, gate, ledgers", "", f"{ours:.2f}", "<= 2", "yes" if ours <= 2 else "NO"),
        ("8 whole episodes: prompt, sample, step, trajectory", "", f"{statistics.median(ratios[False]):.2f}", "", ""),
    ]
    print_table("A group of 8", ("", "µs", "ratio", "target", "held"), rows)


async def crowd(groups):
    """All groups at a time: each waits for the last to have begun."""
    started, everybody = 0, anyio.Event()
    rollouts = Rollouts(PipelinePlan(1, groups, workers=groups), order=lambda i: i)

    async def produce(ticket):
        nonlocal started
        started += 1
        if started == groups:
            everybody.set()
        await everybody.wait()
        return Group(ticket, 0, 0.0)

    began = time.perf_counter()
    async with rollouts.running(produce):
        async for batch in rollouts:
            await batch.all()
            batch.trained()
    return time.perf_counter() - began


async def memory(groups):
    """Return the greatest traced memory of each tenth of a run."""
    instant = Instant()
    policy = PublishedPolicy(instant)
    roller = Roller(instant, policy, RolloutRules(SIZE), tokenizer=instant)
    batches = groups // BATCH
    rollouts = Rollouts(PipelinePlan(batches, BATCH, 1, workers=BATCH), order=lambda i: i)
    found: list[float] = []
    async with rollouts.running(roller):
        async for batch in rollouts:
            await batch.all()
            await policy.publish(Instant(), batch.update + 1)
            batch.trained()
            if rollouts.version % max(1, batches // 10) == 0:
                gc.collect()
                found.append(tracemalloc.get_traced_memory()[0] / 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--simulated", type=int, default=40)
    parser.add_argument("--groups", type=int, default=2000)
    parser.add_argument("--many", type=int, default=10_000)
    options = parser.parse_args()
    print(machine())
    overlap(options.steps, options.seeds, options.simulated)
    steps = max(200, options.steps * 2)
    began = time.process_time()  # nothing waits in simulated time
    policies(steps)
    taken = (time.process_time() - began) * 10_000 / (12 * steps)
    print(f"10,000 simulated steps take {taken:.1f} CPU s (target: < 10 s; held: {'yes' if taken < 10 else 'NO'})\n")
    orchestration(options.groups)
    print(f"1,000 groups at a time, each waiting for the last to have begun: {anyio.run(crowd, 1000):.2f} s\n")
    tracemalloc.start()
    found = anyio.run(memory, options.many)
    print_table(
        f"Memory while {options.many} groups go through, MB",
        ("after a tenth", "after a half", "at the end"),
        [(f"{found[0]:.2f}", f"{found[len(found) // 2]:.2f}", f"{found[-1]:.2f}")],
    )


if __name__ == "__main__":
    main()
