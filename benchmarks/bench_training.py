"""The executor's training beside a plain loop of torch, TRL, and peft under the Trainer of transformers.

Prints one table. All contenders run in this process, one after the other in every repetition, on the same rows; wall
and CPU seconds (all threads) are medians. TRL is looked for on the path and in ``--peers``, which ``make peers`` fills;
what is absent is said. Peak memory is measured in a process of its own for each contender; the overhead around torch,
which is less than what the place of a process's memory makes of a step, is the median over several processes.

    python benchmarks/bench_training.py [--rows 64] [--repetitions 5] [--threads 1] [--peers .peers]
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
from _loops import BUDGET, RATE, Contender, Taken, even, measured, median, opened, ours, plain, rows, unpadded
from _table import machine, print_table

from crucible_kitchen.errors import MissingExtra
from crucible_kitchen.types import Datum, LoraSpec
from crucible_kitchen_torch.memory import peak_memory

Line = tuple[str, str, str, str, str]
PROCESSES = 5


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--part", choices=["tiny", "memory-ours", "memory-trl"], help=argparse.SUPPRESS)
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


def lines(what: str, taken: Taken, tokens: int, targets: dict[str, str]) -> list[Line]:
    """The first is the executor; the others are what it is compared with."""
    (mine, (wall, cpu)), *others = median(taken).items()
    found = [(what, mine, f"{tokens / wall:,.0f}", f"{tokens / cpu:,.0f}", "")]
    for name, (w, c) in others:
        target = f", wanted {targets[name]}" if name in targets else ""
        ratio = f"executor {w / wall:.2f} x wall, {c / cpu:.2f} x CPU{target}"
        found.append((what, name, f"{tokens / w:,.0f}", f"{tokens / c:,.0f}", ratio))
    return found


PADDED, SAME = "plain loop, one padded batch", "plain loop, the same micro-batches"


async def tiny(args: argparse.Namespace, stack: AsyncExitStack) -> Taken:
    """One process's share of ``against_plain_loop``: 64 rows of 64 tokens a step."""
    from crucible_kitchen_torch.tiny import TinyConfig, TinyModel

    data = even(64, 64, 256)
    one, two = TinyModel(TinyConfig()), TinyModel(TinyConfig())
    session = await opened(stack, "tiny", None, args.threads)
    contenders = {
        "executor": ours(session, data, 64),
        PADDED: plain(one, lambda t: one.lm_head(one(t)), data, 10**6),
        SAME: unpadded(two, data, BUDGET),
    }
    return await measured(contenders, 3 * args.repetitions)


def against_plain_loop(args: argparse.Namespace) -> list[Line]:
    """tiny, 4,096 tokens a step."""
    import torch

    from crucible_kitchen_torch.tiny import TinyConfig, TinyModel

    tokens, taken = 64 * 64, dict[str, list[tuple[float, float]]]()
    for _ in range(PROCESSES):
        for name, seconds in apart(args, "tiny").items():
            taken.setdefault(name, []).extend(seconds)
    model = TinyModel(config := TinyConfig())
    weights = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()
    work = 6 * weights * tokens + 12 * config.layers * config.width * 64 * tokens
    a = torch.randn(1024, 1024)
    rate = 0.0
    for _ in range(8):
        cpu = time.process_time()
        a @ a
        rate = max(rate, 2 * 1024**3 / (time.process_time() - cpu))
    reached = work / median(taken)["executor"][1] / rate
    found = lines("tiny, 4,096 tokens a step", taken, tokens, {PADDED: "0.97", SAME: "0.98"})
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
        plain(causal, lambda t: causal(input_ids=t, use_cache=False).logits, data[s : s + 32], 512)
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


async def memory(args: argparse.Namespace, stack: AsyncExitStack) -> float:
    """This process's peak of memory after one step on a vocabulary of 49,152, in MB."""
    import torch

    data = even(8, 255, 49_152)
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    model = llama(Path(directory), 49_152)
    if args.part == "memory-trl":
        await trl(model, data, directory, packing=False)()
    else:
        await ours(await opened(stack, str(model), None, args.threads), data, 8)()
    # Not what getrusage counts, which a process inherits from its parent.
    return peak_memory(torch.device("cpu"))["peak_memory_bytes"] / 2**20


def apart(args: argparse.Namespace, part: str) -> Any:
    """Measure a part in a process of its own.

    Raises:
        ImportError: it needs TRL, which is absent.
    """
    given = {"part": part, "threads": args.threads, "repetitions": args.repetitions, "peers": args.peers}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in given.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImportError(done.stderr.strip().rpartition("\n")[2])
    return json.loads(done.stdout.splitlines()[-1])


def peaks(args: argparse.Namespace) -> list[Line]:
    what, mine = "peak memory, 49,152 words, 8 x 256 tokens, MB", apart(args, "memory-ours")
    found = [(what, "executor", f"{mine:,.0f}", "", "")]
    try:
        theirs = apart(args, "memory-trl")
    except ImportError:
        return found
    return [*found, (what, "TRL", f"{theirs:,.0f}", "", f"executor {mine / theirs:.2f} x, wanted 0.8 at most")]


async def main() -> None:
    import torch

    args = options()
    sys.path.append(args.peers)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    if args.part:
        async with AsyncExitStack() as stack:
            print(json.dumps(await (tiny if args.part == "tiny" else memory)(args, stack)))
        return
    found = against_plain_loop(args)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        model = llama(Path(directory, "model"), 8192)
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
