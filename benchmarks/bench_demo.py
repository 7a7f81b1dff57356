"""The demo's training: how fast and how well ``tiny`` learns two-digit sums, beside a plain loop of torch.

Prints one table. Held-out problems are the task's test split; they are never trained on. CPU seconds count all threads
of this process, so that they mean something on a busy machine.

    python benchmarks/bench_demo.py [--steps 850] [--learning-rate 0.002] [--threads 2] ...
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anyio
import numpy as np

from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.ports.training_client import TrainingSession
from crucible_kitchen.tasks import TaskRows, open_task
from crucible_kitchen.types import AdamParams, Datum, SamplingParams, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient


@dataclass
class Measured:
    """What one measurement took."""

    wall: float
    cpu: float


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=float, default=0.05)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--reference-steps", type=int, default=40)
    return parser.parse_args()


def datums(rows: TaskRows, tokenizer: Tokenizer) -> list[Datum]:
    """Only the answer and the end token carry weight."""
    found = []
    for i, row in enumerate(rows):
        prompt = tokenizer.encode(row["prompt"])
        answer = [*tokenizer.encode(row["completion"]), tokenizer.eos_id]
        found.append(Datum.from_tokens(prompt + answer, [0] * len(prompt) + [1] * len(answer), key=str(i)))
    return found


def batches(data: Sequence[Datum], size: int, seed: int) -> Iterator[list[Datum]]:
    """Endless batches, shuffled anew in every epoch; the last of an epoch may be smaller."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data))
        for start in range(0, len(data), size):
            yield [data[i] for i in order[start : start + size]]


def adam(args: argparse.Namespace, step: int) -> AdamParams:
    """Linear warm-up, then linear decay to 0."""
    warm = args.warmup * args.steps
    share = (step + 1) / warm if step < warm else (args.steps - step) / (args.steps - warm)
    return AdamParams(args.learning_rate * share, beta2=args.beta2, grad_clip_norm=1.0)


async def train(session: TrainingSession, data: list[Datum], args: argparse.Namespace, steps: int) -> Measured:
    wall, cpu = time.perf_counter(), time.process_time()
    for k, batch in zip(range(steps), batches(data, args.batch_size, args.seed), strict=False):
        async with session.step(k) as step:
            gradient = await step.forward_backward(batch)
            weight = sum(float(d.loss_inputs["weights"].sum()) for d in batch)
            applied = await step.apply(adam(args, k), scale=1 / weight)
            await gradient
            await applied
    return Measured(time.perf_counter() - wall, time.process_time() - cpu)


async def accuracy(session: TrainingSession, rows: TaskRows) -> tuple[float, Measured]:
    wall, cpu = time.perf_counter(), time.process_time()
    sampler = await session.sampler()
    right: list[bool] = []

    async def ask(prompt: str, answer: str) -> None:
        params = SamplingParams(max_tokens=8, temperature=0)
        right.append((await sampler.sample(sampler.tokenizer.encode(prompt), params))[0].text == answer)

    async with anyio.create_task_group() as group:
        for row in rows:
            group.start_soon(ask, row["prompt"], row["completion"])
    await sampler.aclose()
    return sum(right) / len(right), Measured(time.perf_counter() - wall, time.process_time() - cpu)


def plain_loop(data: list[Datum], args: argparse.Namespace) -> Measured:
    """The same steps without the executor: one padded batch, one backward, torch's AdamW."""
    import torch
    from torch.nn import functional as F

    from crucible_kitchen_torch.tiny import TinyConfig, TinyModel

    model = TinyModel(TinyConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, fused=True)
    wall, cpu = time.perf_counter(), time.process_time()
    for _, batch in zip(range(args.reference_steps), batches(data, args.batch_size, args.seed), strict=False):
        length = max(len(d) for d in batch)
        tokens, targets = np.zeros((len(batch), length), np.int64), np.zeros((len(batch), length), np.int64)
        weights = np.zeros((len(batch), length), bool)
        for row, d in enumerate(batch):
            tokens[row, : len(d)] = d.inputs["tokens"]
            targets[row, : len(d)] = d.loss_inputs["target_tokens"]
            weights[row, : len(d)] = d.loss_inputs["weights"] != 0
        chosen = torch.from_numpy(weights)
        scores = model.lm_head(model(torch.from_numpy(tokens))[chosen])
        F.cross_entropy(scores, torch.from_numpy(targets)[chosen]).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Measured(time.perf_counter() - wall, time.process_time() - cpu)


def table(lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


async def main() -> None:
    args = options()
    client = TorchTrainingClient(threads=args.threads, tokens_per_microbatch=args.tokens_per_microbatch)
    begun = time.perf_counter()
    train_rows, test_rows = open_task("sums", seed=args.seed), open_task("sums", split="test")
    with tempfile.TemporaryDirectory() as directory:
        async with client.open_session(SessionSpec("tiny", None, args.seed, directory)) as session:
            opened = time.perf_counter() - begun
            data = datums(train_rows, session.tokenizer)
            before, _ = await accuracy(session, test_rows)
            training = await train(session, data, args, args.steps)
            after, evaluation = await accuracy(session, test_rows)
            parameters = session.info.parameters
    plain = plain_loop(data, args)
    table(
        [
            ("parameters", f"{parameters:,}"),
            ("rows trained / held out", f"{len(data):,} / {len(test_rows):,}"),
            ("batch x steps, peak rate", f"{args.batch_size} x {args.steps}, {args.learning_rate}"),
            ("import and open, s", f"{opened:.1f}"),
            ("accuracy before", f"{before:.3f}"),
            ("accuracy after", f"{after:.3f}"),
            ("training, s (CPU s)", f"{training.wall:.1f} ({training.cpu:.1f})"),
            (
                "one step, ms (CPU ms)",
                f"{training.wall / args.steps * 1e3:.1f} ({training.cpu / args.steps * 1e3:.1f})",
            ),
            (
                "plain loop's step, ms (CPU ms)",
                f"{plain.wall / args.reference_steps * 1e3:.1f} ({plain.cpu / args.reference_steps * 1e3:.1f})",
            ),
            ("evaluation, s (CPU s)", f"{evaluation.wall:.1f} ({evaluation.cpu:.1f})"),
        ]
    )


if __name__ == "__main__":
    anyio.run(main)
