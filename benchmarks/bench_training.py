"""The executor's training beside a plain loop of torch, TRL, and peft under the Trainer of transformers.

Prints one table. All contenders run in this process, one after the other in every repetition, on the same rows; wall
and CPU seconds (all threads) are medians. TRL is looked for on the path and in ``--peers``, which ``make peers`` fills;
what is absent is said. Peak memory is measured in a process of its own for each contender.

    python benchmarks/bench_training.py [--rows 64] [--repetitions 5] [--threads 1] [--peers .peers]
"""

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from _table import machine, print_table

from crucible_kitchen.errors import MissingExtra
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.memory import peak_memory
from crucible_kitchen_torch.microbatches import plan, plan_padded
from crucible_kitchen_torch.unpadded import positions, runs

Contender = Callable[[], Awaitable[None]]
Line = tuple[str, str, str, str, str]
RATE = AdamParams(1e-4, grad_clip_norm=1.0)
BUDGET = 1024


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--memory", choices=["ours", "trl", "nothing"], help=argparse.SUPPRESS)
    return parser.parse_args()


def llama(directory: Path, vocab_size: int) -> Path:
    """A random Llama of 4 layers and width 192, with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<end>": 0, "<unknown>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=2048, eos_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


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


def plain(model: Any, head: Callable[[Any], Any], data: Sequence[Datum], budget: int) -> Contender:
    """A loop as one writes it by hand: padded micro-batches of the same plan, cross-entropy, fused AdamW."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE.learning_rate, fused=True)
    batches = []
    for batch in plan_padded([len(d) for d in data], 1, budget):
        width = max(len(data[i]) for i in batch)
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


def padded(datum: Datum) -> dict[str, list[int]]:
    """A datum as the whole sequence, which is what trainers take."""
    return {"input_ids": [*datum.inputs["tokens"].tolist(), int(datum.loss_inputs["target_tokens"][-1])]}


def settings(kind: type[Any], directory: str, **more: Any) -> Any:
    return kind(
        output_dir=directory,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        learning_rate=RATE.learning_rate,
        num_train_epochs=1,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **more,
    )


def trl(model: Path, data: Sequence[Datum], directory: str, *, packing: bool) -> Contender:
    """``SFTTrainer`` with 8 rows padded together and 4 such batches a step, or with 2 packed bins of 1024 and 2."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    batch = {"per_device_train_batch_size": 2 if packing else 8, "gradient_accumulation_steps": 2 if packing else 4}
    args = settings(SFTConfig, directory, packing=packing, max_length=1024, **batch)
    causal = AutoModelForCausalLM.from_pretrained(model)
    dataset = Dataset.from_list([padded(d) for d in data])
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = SFTTrainer(model=causal, args=args, train_dataset=dataset, processing_class=tokenizer)

    async def run() -> None:
        trainer.train()

    return run


def hf_peft(model: Path, data: Sequence[Datum], directory: str) -> Contender:
    """peft's adapters on all linear layers under the ``Trainer`` of transformers."""
    import peft
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    causal = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    found = [padded(d) for d in data]
    dataset = Dataset.from_list(
        [{**r, "labels": r["input_ids"], "attention_mask": [1] * len(r["input_ids"])} for r in found]
    )
    trainer = Trainer(
        model=causal,
        args=settings(TrainingArguments, directory, per_device_train_batch_size=8, gradient_accumulation_steps=4),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model)),
    )

    async def run() -> None:
        trainer.train()

    return run


async def measured(contenders: dict[str, Contender], repetitions: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each; interleaved, after one run that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, run in contenders.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            await run()
            if repetition:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {n: (statistics.median(w for w, _ in v), statistics.median(c for _, c in v)) for n, v in found.items()}


def lines(what: str, taken: dict[str, tuple[float, float]], tokens: int, targets: dict[str, str]) -> list[Line]:
    """The first is the executor; the others are what it is compared with."""
    (mine, (wall, cpu)), *others = taken.items()
    found = [(what, mine, f"{tokens / wall:,.0f}", f"{tokens / cpu:,.0f}", "")]
    for name, (w, c) in others:
        target = f", wanted {targets[name]}" if name in targets else ""
        ratio = f"executor {w / wall:.2f} x wall, {c / cpu:.2f} x CPU{target}"
        found.append((what, name, f"{tokens / w:,.0f}", f"{tokens / c:,.0f}", ratio))
    return found


async def against_plain_loop(args: argparse.Namespace, stack: AsyncExitStack) -> list[Line]:
    """tiny, 64 rows of 64 tokens: 4,096 a step."""
    import torch

    from crucible_kitchen_torch.tiny import TinyConfig, TinyModel

    data = even(64, 64, 256)
    one, two = TinyModel(TinyConfig()), TinyModel(TinyConfig())
    rows = "plain loop, the same micro-batches"
    session = await opened(stack, "tiny", None, args.threads)
    contenders = {
        "executor": ours(session, data, 64),
        "plain loop, one padded batch": plain(one, lambda t: one.lm_head(one(t)), data, 10**6),
        rows: unpadded(two, data, BUDGET),
    }
    tokens = 64 * 64
    taken = await measured(contenders, 3 * args.repetitions)
    weights = sum(p.numel() for p in one.parameters()) - one.embed.weight.numel()
    config = one.config
    work = 6 * weights * tokens + 12 * config.layers * config.width * 64 * tokens
    a = torch.randn(1024, 1024)
    rate = 0.0
    for _ in range(8):
        cpu = time.process_time()
        a @ a
        rate = max(rate, 2 * 1024**3 / (time.process_time() - cpu))
    reached = work / taken["executor"][1] / rate
    found = lines("tiny, 4,096 tokens a step", taken, tokens, {"plain loop, one padded batch": "0.97", rows: "0.98"})
    limit = f"executor reaches {reached:.0%} of it"
    return [
        *found,
        ("limit", f"matrix product, {rate / 1e9:.0f} GFLOP/s a CPU second", "", f"{rate * tokens / work:,.0f}", limit),
    ]


async def against_trl(args: argparse.Namespace, stack: AsyncExitStack, model: Path, directory: str) -> list[Line]:
    from transformers import AutoModelForCausalLM

    data = rows(args.rows, 8192)
    causal = AutoModelForCausalLM.from_pretrained(model)
    steps = [
        plain(causal, lambda t: causal(input_ids=t, use_cache=False).logits, data[s : s + 32], 10**6)
        for s in range(0, len(data), 32)
    ]

    async def loop() -> None:
        for step in steps:
            await step()

    contenders = {
        "executor": ours(await opened(stack, str(model), None, args.threads), data, 32),
        "plain loop, length-sorted": loop,
    }
    try:
        contenders["TRL SFTTrainer, padded"] = trl(model, data, directory, packing=False)
        contenders["TRL SFTTrainer, packing"] = trl(model, data, directory, packing=True)
    except ImportError as error:
        print(f"TRL is absent ({error}): run `make peers` first\n", file=sys.stderr)
    what = f"Llama 4 x 192, {len(data)} rows of log-normal length"
    taken = await measured(contenders, args.repetitions)
    return lines(what, taken, sum(len(d) for d in data), dict.fromkeys(list(contenders)[2:], "2.5"))


async def against_peft(args: argparse.Namespace, stack: AsyncExitStack, model: Path, directory: str) -> list[Line]:
    data = rows(args.rows, 8192)
    session = await opened(stack, str(model), LoraSpec(8, alpha=16), args.threads)
    contenders = {"executor": ours(session, data, 32), "peft, transformers' Trainer": hf_peft(model, data, directory)}
    taken = await measured(contenders, args.repetitions)
    what = "the same, LoRA of rank 8"
    return lines(what, taken, sum(len(d) for d in data), {"peft, transformers' Trainer": "1.1"})


async def memory(args: argparse.Namespace) -> None:
    """Print this process's peak of memory after one step on a vocabulary of 49,152, in MB."""
    import torch

    data = even(8, 255, 49_152)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        model = llama(Path(directory), 49_152)
        if args.memory == "trl":
            await trl(model, data, directory, packing=False)()
        elif args.memory == "ours":
            await ours(await opened(stack, str(model), None, args.threads), data, 8)()
    # Not what getrusage counts, which a process inherits from its parent.
    print(json.dumps(peak_memory(torch.device("cpu"))["peak_memory_bytes"] / 2**20))


def peaks(args: argparse.Namespace) -> list[Line]:
    found: dict[str, float] = {}
    for who in ("ours", "trl"):
        command = [sys.executable, __file__, "--memory", who, "--threads", str(args.threads), "--peers", args.peers]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[who] = json.loads(done.stdout.splitlines()[-1])
    what = "peak memory, 49,152 words, 8 x 256 tokens, MB"
    ratio = f"executor {found['ours'] / found['trl']:.2f} x, wanted 0.8 at most" if len(found) == 2 else "TRL absent"
    return [
        (what, who, f"{mb:,.0f}", "", ratio if who == "trl" or len(found) == 1 else "") for who, mb in found.items()
    ]


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
    found: list[Line] = []
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        model = llama(Path(directory, "model"), 8192)
        found += await against_plain_loop(args, stack)
        found += await against_trl(args, stack, model, directory)
        try:
            found += await against_peft(args, stack, model, directory)
        except (ImportError, MissingExtra) as error:
            print(f"peft is absent: {error}\n", file=sys.stderr)
    found += peaks(args)
    title = f"Training ({machine()}, torch {torch.__version__}, {args.threads} thread(s))"
    print_table(title, ("load", "who", "tokens/s", "tokens/CPU s", "ratio"), found)


if __name__ == "__main__":
    anyio.run(main)
