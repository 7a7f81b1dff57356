"""What the training benchmarks share: rows, the executor and plain loops of torch as contenders, and the clock.

Knows no peer. Read next: ``bench_training.py``.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np

from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.microbatches import plan
from crucible_kitchen_torch.unpadded import positions, runs

Contender = Callable[[], Awaitable[None]]
Taken = dict[str, list[tuple[float, float]]]
RATE = AdamParams(1e-4, grad_clip_norm=1.0)
BUDGET = 1024


def rows(count: int, vocab_size: int) -> list[Datum]:
    """Rows of log-normal length, sigma 0.8, median 122."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.8, 0.8, count)), 8, 1024).astype(int)
    return [Datum.from_tokens(rng.integers(2, vocab_size, n), [1.0] * n) for n in lengths]


def even(count: int, length: int, vocab_size: int) -> list[Datum]:
    """Rows of one length."""
    rng = np.random.default_rng(0)
    return [Datum.from_tokens(rng.integers(2, vocab_size, length + 1), [1.0] * (length + 1)) for _ in range(count)]


async def opened(stack: AsyncExitStack, model: str, lora: LoraSpec | None, threads: int) -> Any:
    client = TorchTrainingClient(threads=threads, tokens_per_microbatch=BUDGET, verify_invariance="off")
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    return await stack.enter_async_context(client.open_session(SessionSpec(model, lora, 0, directory)))


def ours(session: Any, data: Sequence[Datum], per_step: int) -> Contender:
    async def run() -> None:
        for start in range(0, len(data), per_step):
            batch = data[start : start + per_step]
            async with session.step(session.position) as step:
                gradient = await step.forward_backward(batch)
                applied = await step.apply(RATE, scale=1 / sum(len(d) for d in batch))
                await gradient
                await applied

    return run


def sorted_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of rows of like length, the longest first, of so many positions at most, padding counted."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def plain(model: Any, head: Callable[[Any], Any], data: Sequence[Datum], budget: int) -> Contender:
    """A loop as one writes it by hand: rows sorted by length, padded micro-batches, cross-entropy, fused AdamW."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE.learning_rate, fused=True)
    batches = []
    for batch in sorted_by_length([len(d) for d in data], budget):
        width = len(data[batch[0]])
        tokens, targets = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        for row, i in enumerate(batch):
            tokens[row, : len(data[i])] = torch.from_numpy(data[i].inputs["tokens"])
            targets[row, : len(data[i])] = torch.from_numpy(data[i].loss_inputs["target_tokens"])
        batches.append((tokens, targets))
    total = sum(len(d) for d in data)

    async def run() -> None:
        for tokens, targets in batches:
            loss = F.cross_entropy(head(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RATE.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


def unpadded(model: Any, data: Sequence[Datum], budget: int) -> Contender:
    """A loop over the executor's own micro-batches of the built-in model: what differs is the executor around torch."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE.learning_rate, fused=True)
    lengths = [len(d) for d in data]
    total = sum(lengths)
    batches = []
    for batch in plan(lengths, 1, budget):
        tokens, targets = (
            torch.from_numpy(np.concatenate([rows[i] for i in batch]))
            for rows in ([d.inputs["tokens"] for d in data], [d.loss_inputs["target_tokens"] for d in data])
        )
        batches.append((tokens, targets, [lengths[i] for i in batch]))

    async def run() -> None:
        for tokens, targets, own in batches:
            hidden = model(tokens[None], positions=positions(own, tokens.device), rows=runs(own))[0]
            loss = F.cross_entropy(model.lm_head(hidden), targets, reduction="sum")
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RATE.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


async def measured(contenders: dict[str, Contender], repetitions: int) -> Taken:
    """Wall and CPU seconds of each, interleaved, in turns forwards and backwards, after one run that does not count."""
    found: Taken = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name in list(contenders)[:: 1 if repetition % 2 else -1]:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            await contenders[name]()
            if repetition:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def median(taken: Taken) -> dict[str, tuple[float, float]]:
    return {n: (statistics.median(w for w, _ in v), statistics.median(c for _, c in v)) for n, v in taken.items()}
