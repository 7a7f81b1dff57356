"""Data stages: open the splits, turn rows into tokens, plan the batches.

They know the dataset port and a session's tokenizer, no backend. Read next: ``crucible_kitchen.rendering``.
"""

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from crucible_kitchen.config import DataConfig, EvalConfig, HeldOutConfig, ModelConfig, OptimConfig
from crucible_kitchen.errors import DatasetNotFound, EmptyDataset
from crucible_kitchen.events import DataPrepared
from crucible_kitchen.ports import Dataset, DatasetSpec, DatasetStore, EvalExample, Tokenizer, TrainingSession
from crucible_kitchen.rendering import TokenizedDataset, epoch_order, eval_example, read_row, tokenize
from crucible_kitchen.types import Datum, IntArray, Row
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "Batch",
    "Corpus",
    "EpochBatches",
    "QuestionedPlan",
    "ScheduleConfig",
    "SupervisedDataConfig",
    "TrainingData",
    "TrainingPlan",
    "build_dataset",
    "held_out_questions",
    "load_dataset",
    "open_corpus",
    "pin_corpus",
    "steps_planned",
]

ROWS_PER_CHUNK = 512  # rows tokenized between two chances to cancel


class ScheduleConfig(DataConfig, OptimConfig):
    """What decides how many steps a run has."""


class SupervisedDataConfig(ModelConfig, ScheduleConfig, EvalConfig):
    """What preparing the data depends on."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The opened splits: rows to train on, and rows that are never trained on (None where the source has none)."""

    train: Dataset
    held_out: Dataset | None


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one optimizer step.

    Attributes:
        epoch: which pass over the data.
        index: which step of the epoch.
        rows: indices into the training data, in order.
    """

    epoch: int
    index: int
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class EpochBatches(Sequence[Batch]):
    """The batches of one epoch, made when they are asked for; the last one may be smaller."""

    epoch: int
    order: IntArray
    size: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.steps))]
        if not 0 <= index < self.steps:
            raise IndexError(index)
        start = index * self.size
        return Batch(self.epoch, index, tuple(int(i) for i in self.order[start : start + self.size]))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainingPlan:
    """Which rows are trained on in which step; what the rows are stands in a subclass.

    Attributes:
        name: the dataset's name.
        fingerprint: sha256 of the training rows.
        rows: how many there are.
        rows_per_step: rows of one optimizer step.
        parts: how many submissions a step's rows are split into (gradient accumulation).
        seed: of the shuffling.
        shuffle: whether epochs are shuffled.
        total_steps: optimizer steps of the whole run.
    """

    name: str
    fingerprint: str
    rows: int
    rows_per_step: int
    parts: int
    seed: int
    shuffle: bool
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows; the last may be smaller."""
        return math.ceil(self.rows / self.rows_per_step)

    def batches(self, epoch: int) -> EpochBatches:
        """Return the batches of an epoch; the run's last epoch ends with its last step."""
        count = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        order = epoch_order(self.rows, self.seed, epoch, shuffle=self.shuffle)
        return EpochBatches(epoch, order, self.rows_per_step, max(0, count))

    def submissions(self, batch: Batch) -> list[tuple[int, ...]]:
        """Return a batch's rows as the submissions of its step."""
        size = math.ceil(self.rows_per_step / self.parts)
        return [batch.rows[i : i + size] for i in range(0, len(batch.rows), size)]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuestionedPlan(TrainingPlan):
    """A plan with questions to evaluate on.

    Attributes:
        examples: held-out questions; empty where there are none.
    """

    examples: tuple[EvalExample, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainingData(QuestionedPlan):
    """Everything trained and evaluated on, as tokens.

    Attributes:
        tokenized: the training rows.
    """

    tokenized: TokenizedDataset

    def datums(self, batch: Batch) -> list[list[Datum]]:
        """Return a batch's rows as the submissions of its step, each a list of datums."""
        return [[self.tokenized.datum(row) for row in rows] for rows in self.submissions(batch)]


def steps_planned(rows: int, config: ScheduleConfig) -> tuple[int, int]:
    """Return how many rows an optimizer step has, and how many steps the run."""
    rows_per_step = config.batch_size * config.gradient_accumulation
    total = config.epochs * math.ceil(rows / rows_per_step)
    return rows_per_step, min(total, config.max_steps) if config.max_steps else total


@stage(writes="corpus")
async def load_dataset(dataset_store: DatasetStore, config: SupervisedDataConfig, run: Run) -> AsyncIterator[Corpus]:
    """Open the training split and a split that is never trained on."""
    options = tuple(sorted(config.dataset_options.items()))
    spec = DatasetSpec(config.dataset, config.split, config.dataset_size, config.seed, config.holdout, options)
    yield await open_corpus(dataset_store, spec, config, run)


async def open_corpus(
    store: DatasetStore,
    spec: DatasetSpec,
    config: HeldOutConfig,
    run: Run,
    usual: Sequence[str] = ("test", "validation"),
) -> Corpus:
    """Open the training split, and the split asked for to evaluate on, or the first usual one that exists."""
    train = await store.load(spec)
    held_out = await _held_out(store, spec, config, usual)
    if held_out is None:
        run.warn("data.no_held_out", f"{spec.name!r} has no held-out rows: nothing can be evaluated")
    return Corpus(train, held_out)


async def _held_out(
    store: DatasetStore, train: DatasetSpec, config: HeldOutConfig, usual: Sequence[str]
) -> Dataset | None:
    for split in [config.eval_split] if config.eval_split else usual:
        if split == train.split:
            continue
        try:
            return await store.load(replace(train, split=split, limit=config.eval_size))
        except (DatasetNotFound, EmptyDataset):
            if config.eval_split:
                raise
    return None


@stage(writes="data")
async def build_dataset(
    corpus: Corpus, session: TrainingSession, config: SupervisedDataConfig, run: Run
) -> AsyncIterator[TrainingData]:
    """Turn all rows into tokens, once and before the first step, so that a bad row is found now."""
    tokenized = await _tokenize(corpus.train, session, config)
    if len(tokenized) == 0:
        raise EmptyDataset(
            f"no row of {config.dataset!r} has a token to train on within the longest sequence allowed",
            hint="raise max_length, or see train_on",
        )
    rows_per_step, total_steps = steps_planned(len(tokenized), config)
    data = TrainingData(
        name=config.dataset,
        fingerprint=await pin_corpus(corpus, run),
        rows=len(tokenized),
        tokenized=tokenized,
        examples=await held_out_questions(corpus.held_out, session.tokenizer, session.info.context_length, config, run),
        rows_per_step=rows_per_step,
        parts=config.gradient_accumulation,
        seed=config.seed,
        shuffle=config.shuffle,
        total_steps=total_steps,
    )
    if tokenized.truncated or tokenized.dropped:
        run.warn(
            "data.too_long",
            f"{tokenized.truncated} rows were cut at the longest sequence allowed, {tokenized.dropped} left out",
        )
    run.emit(
        DataPrepared(
            dataset=data.name,
            fingerprint=data.fingerprint,
            rows=len(tokenized),
            tokens=tokenized.token_count,
            trained_tokens=tokenized.trained_tokens,
            truncated=tokenized.truncated,
            steps=data.total_steps,
        )
    )
    yield data


async def pin_corpus(corpus: Corpus, run: Run) -> str:
    """Return the training rows' fingerprint; later attempts of the run must find the same rows, the held-out ones too.

    Raises:
        RunChanged: they are others.
    """
    splits = [split for split in (corpus.train, corpus.held_out) if split is not None]
    fingerprints = [await split.fingerprint() for split in splits]
    run.pin("dataset", "+".join(fingerprint[:12] for fingerprint in fingerprints))
    return fingerprints[0]


async def _tokenize(dataset: Dataset, session: TrainingSession, config: DataConfig) -> TokenizedDataset:
    tokenizer, context = session.tokenizer, session.info.context_length
    parts = []
    for start in range(0, len(dataset), ROWS_PER_CHUNK):
        rows = await dataset.rows(range(start, min(start + ROWS_PER_CHUNK, len(dataset))))
        part = await run_sync(
            tokenize, rows, tokenizer, config, first=start, split=dataset.split, context_length=context
        )
        parts.append(part)
    return TokenizedDataset.join(parts)


async def held_out_questions(
    held_out: Dataset | None, tokenizer: Tokenizer, context_length: int, config: SupervisedDataConfig, run: Run
) -> tuple[EvalExample, ...]:
    """Turn held-out rows into questions; those that leave no room for an answer are left out and counted.

    Args:
        held_out: the rows; None gives no questions.
        tokenizer: of the model that is asked.
        context_length: of that model, in tokens; 0 where it is not known.
        config: how rows are written.
        run: for warnings.
    """
    if held_out is None:
        return ()
    rows = await held_out.rows(range(len(held_out)))
    if read_row(rows[0], config.fields, 0).is_text:
        run.warn("data.no_questions", "rows of running text ask nothing: nothing is evaluated")
        return ()
    everything = await run_sync(_questions, rows, tokenizer, config, held_out.split)
    examples = tuple(e for e in everything if not context_length or len(e.prompt) < context_length)
    if len(examples) < len(everything):
        left_out = len(everything) - len(examples)
        run.warn("data.eval_too_long", f"{left_out} held-out rows leave no room for an answer and are left out")
    return examples


def _questions(
    rows: Sequence[Row], tokenizer: Tokenizer, config: SupervisedDataConfig, split: str
) -> list[EvalExample]:
    return [
        eval_example(row, tokenizer, config, index=i, key=f"{split}/{i}", labels=config.eval_labels)
        for i, row in enumerate(rows)
    ]
