"""What generalised advantage estimation costs per step, beside the ways in use elsewhere, written here in short.

Run: python benchmarks/bench_gae.py [--repetitions 40]. One thread, float64, every way interleaved with the others;
medians. All are checked against the definition before they are timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from _table import machine, print_table
from scipy.signal import lfilter

from crucible_kitchen.learner import gae

GAMMA, LAM = 0.99, 0.95
DECAY = GAMMA * LAM
SHAPES = ((64, 512), (16, 8192), (1024, 128))
TARGET = 0.8
SLIME = "chunked matrix product, chunks of 128, torch (slime)"


class Load:
    """Rewards and values of B rows of T steps; what is after the last step is worth 0."""

    def __init__(self, rows: int, steps: int) -> None:
        rng = np.random.default_rng(0)
        shape = (rows, steps)
        self.r, self.v, self.bootstrap = rng.normal(size=(3, *shape))
        self.tr, self.tv = torch.from_numpy(self.r), torch.from_numpy(self.v)
        self.terminated, self.truncated = (rng.random(shape) < 1 / 300 for _ in range(2))
        self.mask = rng.random(shape) < 0.8
        self.held = np.where(self.mask, self.r, 0.0)
        self.nothing = np.zeros(shape, dtype=bool)
        self.last = self.nothing.copy()
        self.last[:, -1] = True


def ours(load: Load):
    return gae(load.r, load.v, gamma=GAMMA, lam=LAM, terminated=load.last).advantages


def ours_with_ends(load: Load):
    ends = {"terminated": load.terminated, "truncated": load.truncated, "bootstrap": load.bootstrap}
    return gae(load.r, load.v, gamma=GAMMA, lam=LAM, **ends).advantages


def ours_with_ends_and_holes(load: Load):
    ends = {"terminated": load.terminated, "truncated": load.truncated, "bootstrap": load.bootstrap}
    return gae(load.held, load.v, gamma=GAMMA, lam=LAM, mask=load.mask, **ends).advantages


def torch_errors(load: Load):
    following = torch.cat([load.tv[:, 1:], torch.zeros_like(load.tv[:, :1])], 1)
    return load.tr + GAMMA * following - load.tv


def chunked_product(load: Load, size: int):
    """Each chunk is a product with a triangle of powers; a carry goes from chunk to chunk, from the end."""
    x = torch.flip(torch_errors(load), [1])
    rows, steps = x.shape
    x = torch.nn.functional.pad(x, (0, -steps % size))
    i = torch.arange(size)
    gap = i[None, :] - i[:, None]
    triangle = torch.where(gap >= 0, DECAY ** gap.clamp(min=0).double(), 0.0)
    local = x.view(rows, -1, size) @ triangle
    carry, reach, found = torch.zeros(rows, 1, dtype=x.dtype), DECAY ** (i + 1).double(), []
    for c in range(local.shape[1]):
        found.append(local[:, c] + carry * reach)
        carry = found[-1][:, -1:]
    advantages = torch.flip(torch.cat(found, 1)[:, :steps], [1])
    return advantages, advantages + load.tv


def torch_loop(load: Load):
    """A loop over time with one row of errors at a time, kept in a list (TRL's PPO, OpenRLHF, SkyRL)."""
    steps, last, found = load.tr.shape[1], 0.0, []
    for t in reversed(range(steps)):
        following = load.tv[:, t + 1] if t < steps - 1 else 0.0
        last = load.tr[:, t] + GAMMA * following - load.tv[:, t] + DECAY * last
        found.append(last)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + load.tv


def torch_loop_into(load: Load):
    """A loop over time that writes into a result, with flags that mark ends (torchrl)."""
    going = (~torch.from_numpy(load.last)).double()
    errors, factor = torch_errors(load), DECAY * going
    found, last = torch.empty_like(errors), torch.zeros_like(errors[:, 0])
    for t in reversed(range(errors.shape[1])):
        last = found[:, t] = errors[:, t] + factor[:, t] * last
    return found, found + load.tv


def convolution(load: Load):
    """A convolution with a geometric kernel that stops below 1e-7 (torchrl's vectorised form): not exact."""
    reach = min(load.tr.shape[1], int(np.log(1e-7) / np.log(DECAY)) + 1)
    kernel = (DECAY ** torch.arange(reach).double())[None, None]
    x = torch.nn.functional.pad(torch_errors(load), (0, reach - 1))[:, None]
    advantages = torch.nn.functional.conv1d(x, kernel)[:, 0]
    return advantages, advantages + load.tv


def errors_of(load: Load):
    found = load.r - load.v
    found[:, :-1] += GAMMA * load.v[:, 1:]
    return found


def numpy_loop(load: Load):
    """A loop over time, all rows at once (CleanRL, Stable-Baselines3)."""
    x = np.ascontiguousarray(errors_of(load).T)
    for t in range(len(x) - 2, -1, -1):
        x[t] += DECAY * x[t + 1]
    return x.T, x.T + load.v


def python_loop(load: Load):
    """Lists and floats."""
    found = []
    for r, v in zip(load.r.tolist(), load.v.tolist(), strict=True):
        last = following = 0.0
        row = []
        for t in range(len(r) - 1, -1, -1):
            last = r[t] + GAMMA * following - v[t] + DECAY * last
            following = v[t]
            row.append(last)
        found.append(row[::-1])
    return np.array(found)


def filtered(load: Load):
    """scipy's recursive filter over reversed errors; cannot stop at an end."""
    return lfilter([1.0], [1.0, -DECAY], errors_of(load)[:, ::-1], axis=1)[:, ::-1]


WAYS: dict[str, tuple[str, Callable[[Load], object]]] = {
    "crucible_kitchen.learner.gae": ("yes", ours),
    "the same, with ends inside rows": ("yes", ours_with_ends),
    "the same, with ends and holes": ("yes", ours_with_ends_and_holes),
    SLIME: ("no", lambda load: chunked_product(load, 128)),
    "the same, chunks of 32": ("no", lambda load: chunked_product(load, 32)),
    "scipy.signal.lfilter": ("no", filtered),
    "numpy loop over time (CleanRL, SB3)": ("yes", numpy_loop),
    "truncated convolution, torch (torchrl, vectorised)": ("no", convolution),
    "torch loop over time, flags (torchrl)": ("yes", torch_loop_into),
    "torch loop over time, a list (TRL, OpenRLHF)": ("no", torch_loop),
    "Python loop": ("yes", python_loop),
}


def check(load: Load) -> None:
    """Hold every way without ends to the definition, and ours with ends to itself on joined trajectories."""
    reference = python_loop(load)
    for name, (_, way) in WAYS.items():
        found = way(load)
        advantages = np.asarray(found[0] if isinstance(found, tuple) else found)
        if "ends" not in name:
            limit = 1e-4 if "convolution" in name else 1e-9
            assert np.abs(advantages - reference).max() < limit, name


def measure(load: Load, repetitions: int) -> dict[str, float]:
    """Return the median nanoseconds per step of every way."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repetition in range(repetitions + 2):
        for name, (_, way) in WAYS.items():
            if any(word in name for word in ("loop", "convolution")) and repetition % 5:
                continue  # slow, and steady enough
            way(load)  # with the caches as its own last call left them
            began = time.perf_counter()
            way(load)
            if repetition > 1:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) / load.r.size * 1e9 for name, found in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=40)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    found = []
    for shape in SHAPES:
        load = Load(*shape)
        check(load)
        found.append(measure(load, repetitions))
    rows = []
    for name, (ends, _) in WAYS.items():
        times = [times[name] for times in found]
        rows.append([name, ends, *times, times[0] / found[0][SLIME]])
    head = ["way", "may end inside rows", *(f"{b}x{t}, ns/step" for b, t in SHAPES), "of slime's, 64x512"]
    print_table(f"Advantages by GAE ({machine()})", head, rows)
    worst = max(row[-1] for row in rows[:3])
    print(
        f"Target, with ends and holes, of slime's: <= {TARGET}; found {worst:.2f}: {'yes' if worst <= TARGET else 'NO'}"
    )


if __name__ == "__main__":
    main()
