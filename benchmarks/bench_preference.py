"""Direct preference optimization on the local executor beside TRL's DPOTrainer: the same model, pairs, batch and steps.

Prints one table. Both score the pairs under the frozen reference and take one epoch of optimizer steps; the executor's
reference pass is in its time. Medians of interleaved repetitions. Peak memory is measured in a process of its own for
each. TRL is looked for on the path and in ``--peers``, which ``make peers`` fills; what is absent is said.

    python benchmarks/bench_preference.py [--pairs 64] [--batch 8] [--repetitions 5] [--threads 1] [--peers .peers]
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import numpy as np
from _loops import RATE, Contender, measured, median, opened
from _table import machine, print_table
from bench_training import llama, settings

from crucible_kitchen.learner import DPO
from crucible_kitchen.stages.distillation_data import answer_datum
from crucible_kitchen.types import Datum
from crucible_kitchen_torch.memory import peak_memory

VOCABULARY = 8192
BETA = 0.1


class Pair(NamedTuple):
    """One prompt and two answers, as tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--memory", choices=["ours", "trl"], help=argparse.SUPPRESS)
    return parser.parse_args()


def pairs(count: int) -> list[Pair]:
    """Prompts and answers of log-normal length, medians 122 and 55 tokens, as chats have them."""
    rng = np.random.default_rng(0)

    def text(median: float, most: int) -> list[int]:
        length = int(np.clip(np.exp(rng.normal(np.log(median), 0.6)), 4, most))
        return [int(token) for token in rng.integers(2, VOCABULARY, length)]

    return [Pair(text(122, 512), text(55, 256), text(55, 256)) for _ in range(count)]


def ours(session: Any, data: Sequence[Pair], per_step: int) -> Contender:
    """The reference's pass over all answers, then an epoch of steps."""
    plain = [answer_datum(pair.prompt, [*answer, 0], "") for pair in data for answer in (pair.chosen, pair.rejected)]
    loss = DPO(beta=BETA)

    async def run() -> None:
        reference = (await (await session.forward(plain))).logprobs
        datums = [
            Datum(d.inputs, {**d.loss_inputs, "reference_logprobs": row})
            for d, row in zip(plain, reference, strict=True)
        ]
        for start in range(0, len(datums), 2 * per_step):
            batch = datums[start : start + 2 * per_step]
            async with session.step(session.position) as step:
                gradient = await step.forward_backward(batch, loss)
                applied = await step.apply(RATE, scale=2 / len(batch))
                await gradient
                await applied

    return run


def trl(model: Path, data: Sequence[Pair], directory: str, per_step: int) -> Contender:
    """``DPOTrainer`` with its frozen copy of the model; tokens are made before the clock starts."""
    import datasets
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    columns = [
        {name: " " * bool(i) + " ".join(f"w{t}" for t in side) for i, (name, side) in enumerate(pair._asdict().items())}
        for pair in data
    ]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=settings(DPOConfig, directory, per_device_train_batch_size=per_step, beta=BETA),
        train_dataset=datasets.Dataset.from_list(columns),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)

    async def run() -> None:
        trainer.train()

    return run


async def memory(args: argparse.Namespace) -> None:
    """Print this process's peak of memory after one epoch, in MB."""
    import torch

    data = pairs(args.pairs)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        model = llama(Path(directory, "model"), VOCABULARY)
        if args.memory == "trl":
            await trl(model, data, directory, args.batch)()
        else:
            await ours(await opened(stack, str(model), None, args.threads), data, args.batch)()
    print(json.dumps(peak_memory(torch.device("cpu"))["peak_memory_bytes"] / 2**20))


def peaks(args: argparse.Namespace) -> list[tuple[str, ...]]:
    found: dict[str, float] = {}
    for who in ("ours", "trl"):
        command = [sys.executable, __file__, "--memory", who, "--peers", args.peers]
        command += [f"--{name}={getattr(args, name)}" for name in ("pairs", "batch", "threads")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[who] = json.loads(done.stdout.splitlines()[-1])
    both = len(found) == 2
    ratio = f"executor {found['ours'] / found['trl']:.2f} x, wanted 0.8 at most" if both else "TRL absent"
    return [("peak memory, MB", who, f"{mb:,.0f}", "", ratio if who == "trl" else "") for who, mb in found.items()]


async def main() -> None:
    import torch

    args = options()
    sys.path.append(args.peers)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    if args.memory:
        await memory(args)
        return
    data = pairs(args.pairs)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        model = llama(Path(directory, "model"), VOCABULARY)
        contenders = {"executor": ours(await opened(stack, str(model), None, args.threads), data, args.batch)}
        try:
            contenders["TRL DPOTrainer"] = trl(model, data, directory, args.batch)
        except ImportError as error:
            print(f"TRL is absent ({error}): run `make peers` first\n", file=sys.stderr)
        taken = median(await measured(contenders, args.repetitions))
    wall, cpu = taken["executor"]
    what = f"Llama 4 x 192, {args.pairs} pairs, {args.batch} a step"
    lines: list[tuple[str, ...]] = []
    for name, (w, c) in taken.items():
        ratio = "" if name == "executor" else f"executor {w / wall:.2f} x wall, {c / cpu:.2f} x CPU, wanted 1.3"
        lines.append((what, name, f"{args.pairs / w:,.1f}", f"{args.pairs / c:,.1f}", ratio))
    title = f"Preference learning ({machine()}, torch {torch.__version__}, {args.threads} thread(s))"
    print_table(title, ("load", "who", "pairs/s", "pairs/CPU s", "ratio"), lines + peaks(args))


if __name__ == "__main__":
    anyio.run(main)
