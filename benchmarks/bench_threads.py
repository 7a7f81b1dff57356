"""What OpenMP's waiting policy costs a step of the tiny model, on idle cores and beside a busy neighbour.

Run: python benchmarks/bench_threads.py [--steps 60]. Each row is a process of its own, interleaved and repeated; the
median over repetitions of the mean milliseconds per step is printed.
"""

import argparse
import os
import statistics
import subprocess
import sys

STEP = """
import sys, time, torch
from crucible_kitchen_torch.tiny import TinyConfig, TinyModel
threads, steps = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0); torch.set_num_threads(threads)
model = TinyModel(TinyConfig()); optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(0, 250, (64, 9))
def step():
    optimizer.zero_grad()
    scores = model.lm_head(model(tokens))
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
for _ in range(5): step()
began = time.perf_counter()
for _ in range(steps): step()
print((time.perf_counter() - began) / steps * 1e3)
"""
BUSY = "while True: pass"


def measure(threads: int, policy: str, steps: int) -> float:
    """Return milliseconds per step of a fresh process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy} if policy else dict(os.environ)
    command = [sys.executable, "-c", STEP, str(threads), str(steps)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    cases = [(1, "PASSIVE"), (2, "PASSIVE"), (2, "")]
    found: dict[tuple[int, str, bool], list[float]] = {}
    for _ in range(arguments.repetitions):
        for neighbour in (False, True):
            busy = subprocess.Popen([sys.executable, "-c", BUSY]) if neighbour else None
            try:
                for threads, policy in cases:
                    found.setdefault((threads, policy, neighbour), []).append(measure(threads, policy, arguments.steps))
            finally:
                if busy:
                    busy.kill()
                    busy.wait()
    print("| threads | waiting | ms per step, idle | ms per step, beside a busy process |")
    print("|---:|---|---:|---:|")
    for threads, policy in cases:
        idle, shared = (statistics.median(found[threads, policy, n]) for n in (False, True))
        print(f"| {threads} | {'passive (ours)' if policy else 'default of OpenMP'} | {idle:.1f} | {shared:.1f} |")


if __name__ == "__main__":
    main()
