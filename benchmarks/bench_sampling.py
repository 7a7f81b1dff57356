"""Sampling beside ``generate`` of transformers: one prompt many times, many prompts, and who comes while it runs.

Prints one table. Both sides sample the same random Llama (4 layers of width 192, 4096 ids) at temperature 1 and draw as
many tokens as asked for, for the end token is out of reach. Every repetition runs both sides one after the other; a
ratio is the median of the repetitions' own. CPU seconds count all threads, so that they mean something on a busy
machine.

    python benchmarks/bench_sampling.py [--repetitions 5] [--threads 2] [--tokens 64]
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
from _table import machine, print_table

from crucible_kitchen.types import SamplingParams, SessionSpec
from crucible_kitchen.workers import waker
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.decoding import Decoding
from crucible_kitchen_torch.sampling import TorchSampler

VOCABULARY = 4096


@dataclass
class Took:
    """What one measurement took, seconds."""

    wall: float
    cpu: float


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cases", type=int, default=4)
    return parser.parse_args()


def build_llama(directory: Path) -> None:
    """Write a random Llama and a tokenizer of as many words; id 0 ends a text and is never likely."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[0].zero_()
        model.model.norm.weight.fill_(4.0)
    model.save_pretrained(directory)


def prompts(count: int, rng: np.random.Generator) -> list[tuple[list[int], int]]:
    """Prompts of 20 to 300 tokens, each with 16 to 128 tokens to draw."""
    lengths, wanted = rng.integers(20, 301, count), rng.integers(16, 129, count)
    return [(rng.integers(1, VOCABULARY, n).tolist(), int(m)) for n, m in zip(lengths, wanted, strict=True)]


def generate(model: Any, batch: Sequence[list[int]], tokens: int, copies: int = 1) -> None:
    """Draw with transformers, prompts padded on the left."""
    width = max(len(p) for p in batch)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            num_return_sequences=copies,
            pad_token_id=0,
        )
    assert out.shape == (len(batch) * copies, width + tokens)


def static_batches(model: Any, requests: Sequence[tuple[list[int], int]], size: int) -> None:
    """Serve requests in batches of like length, each as long as its longest answer: the best that static can do."""
    order = sorted(requests, key=lambda r: (r[1], len(r[0])))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        generate(model, [p for p, _ in part], max(n for _, n in part))


async def merged(sampler: TorchSampler, requests: Sequence[tuple[list[int], int]], **more: Any) -> None:
    async def one(i: int, prompt: list[int], tokens: int) -> None:
        (sample,) = await sampler.sample(prompt, SamplingParams(max_tokens=tokens, seed=i, **more))
        assert len(sample.tokens) == tokens

    async with anyio.create_task_group() as group:
        for i, (prompt, tokens) in enumerate(requests):
            group.start_soon(one, i, prompt, tokens)


async def steps_to_first_token(sampler: TorchSampler, requests: Sequence[tuple[list[int], int]]) -> int:
    """Count the decoding steps until a request that arrives while others are decoded has its first token."""
    steps = 0
    running, wake = anyio.Event(), waker()
    advance = Decoding.advance

    def counted(self: Decoding) -> Any:
        nonlocal steps
        steps += 1
        if steps == 40:
            wake(running.set)
        return advance(self)

    Decoding.advance = counted  # type: ignore[method-assign]
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(merged, sampler, requests)
            await running.wait()
            before = steps
            async for _ in sampler.stream(list(range(1, 201)), SamplingParams(max_tokens=4, seed=1)):
                break
            took = steps - before
            group.cancel_scope.cancel()
    finally:
        Decoding.advance = advance  # type: ignore[method-assign]
    return took


async def timed(call: Callable[[], Awaitable[None] | None]) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    waiting = call()
    if waiting is not None:
        await waiting
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


async def compare(
    repetitions: int, name: str, ours: Callable[[], Awaitable[None]], peers: dict[str, Callable[[], None]]
) -> tuple[object, ...]:
    """Time both sides in turns; the peer is the fastest of several."""
    await timed(ours)
    tried = {key: (await timed(run)).wall for key, run in peers.items()}
    best = min(tried, key=lambda key: tried[key])
    pairs = [(await timed(ours), await timed(peers[best])) for _ in range(repetitions)]
    return (
        name,
        best,
        statistics.median(a.wall for a, _ in pairs),
        statistics.median(b.wall for _, b in pairs),
        statistics.median(b.wall / a.wall for a, b in pairs),
        statistics.median(b.cpu / a.cpu for a, b in pairs),
    )


async def main() -> None:
    from transformers import AutoModelForCausalLM

    args = options()
    torch.set_num_threads(args.threads)  # of this thread, where `generate` runs; the session sets its own
    rng = np.random.default_rng(0)
    prompt, requests = rng.integers(1, VOCABULARY, 200).tolist(), prompts(64, rng)
    with tempfile.TemporaryDirectory() as directory:
        build_llama(path := Path(directory) / "llama")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        spec = SessionSpec(str(path), None, 0, directory)
        async with TorchTrainingClient(threads=args.threads).open_session(spec) as session:
            sampler = await session.sampler()

            async def many(**more: Any) -> None:
                await sampler.sample(prompt, SamplingParams(max_tokens=args.tokens, seed=1, **more), 16)

            static = {
                f"generate, {n} a batch": (lambda n=n: static_batches(model, requests, n)) for n in (8, 16, 32, 64)
            }
            single = {"generate": lambda: generate(model, [prompt], args.tokens, 16)}
            await timed(lambda: generate(model, [prompt], 4, 16))
            cases = [
                ("16 samples of 200 tokens", many, single),
                ("the same, deterministic", lambda: many(mode="deterministic"), single),
                ("64 mixed requests", lambda: merged(sampler, requests), static),
                ("the same, deterministic", lambda: merged(sampler, requests, mode="deterministic"), static),
            ]
            rows = []
            for case in cases[: args.cases]:
                rows.append(await compare(args.repetitions, *case))
                print(rows[-1], file=sys.stderr)
            first = max([await steps_to_first_token(sampler, requests) for _ in range(args.repetitions)])
    head = ("case", "beside", "s", "its s", "times faster, wall", "CPU")
    print_table(f"Sampling, {args.threads} threads of {machine()}", head, rows)
    print(f"A request that arrives while 64 are decoded has its first token after at most {first} steps.")


if __name__ == "__main__":
    anyio.run(main)
