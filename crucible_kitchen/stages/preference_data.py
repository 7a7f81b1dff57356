"""Preference data stages: open comparisons, turn them into answers as tokens, score these under the reference.

They know ports and a session's tokenizer, no backend. Read next: ``crucible_kitchen.stages.preference``.
"""

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from crucible_kitchen.comparisons import KNOWN_COMPARISONS, KnownDataset
from crucible_kitchen.config import HeldOutConfig, ModelConfig
from crucible_kitchen.errors import CapabilityError, EmptyDataset
from crucible_kitchen.events import DataPrepared, DpoDatasetBuilt
from crucible_kitchen.pairs import Answers, PairConfig, render_answers
from crucible_kitchen.ports import BlobStore, Dataset, DatasetSpec, DatasetStore, TrainingClient, TrainingSession
from crucible_kitchen.rendering import same_tokens
from crucible_kitchen.stages.data import (
    ROWS_PER_CHUNK,
    Corpus,
    ScheduleConfig,
    TrainingPlan,
    open_corpus,
    pin_corpus,
    steps_planned,
)
from crucible_kitchen.stages.kept import kept
from crucible_kitchen.stages.preference_losses import PreferenceLossConfig
from crucible_kitchen.stages.training import session_spec
from crucible_kitchen.tasks import TASKS
from crucible_kitchen.types import Array, Datum
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "ComparisonConfig",
    "PreferenceData",
    "PreferenceDataConfig",
    "Scored",
    "ScoredAnswers",
    "build_prefs",
    "load_comparisons",
    "reference_logprobs",
]

ANSWERS_PER_CALL = 256  # answers scored between two chances to cancel


class ComparisonConfig(ModelConfig, PairConfig, ScheduleConfig, HeldOutConfig):
    """What preparing comparisons depends on."""

    @property
    def paired(self) -> bool:
        """Whether pairs are wanted, else single answers."""
        return True

    @model_validator(mode="after")
    def _answers_are_compared(self) -> Self:
        if self.train_on != "last_assistant_message":
            raise ValueError("train_on: comparisons train on their answers, that is on last_assistant_message")
        return self


class PreferenceDataConfig(PreferenceLossConfig, ComparisonConfig):
    """What preparing comparisons for a preference loss depends on."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PreferenceData(TrainingPlan):
    """Everything compared and evaluated on, as tokens.

    Attributes:
        answers: the training comparisons.
        held_out: comparisons that are never trained on; None where there are none.
    """

    answers: Answers
    held_out: Answers | None


@dataclass(frozen=True, slots=True, eq=False)
class ScoredAnswers:
    """Answers with what the frozen reference thinks of them.

    Attributes:
        answers: as tokens.
        logprobs: the reference's log-probabilities of all answers' tokens, one answer after the other, as the backend
            gave them; None for losses without a reference.
        starts: int64 [answers + 1], where each answer's begin.
        mismatched: float64 [answers], the reference's sum over each mismatched answer; None where none is needed.
    """

    answers: Answers
    logprobs: Array | None
    starts: NDArray[np.int64]
    mismatched: NDArray[np.float64] | None = None

    def datums(self, unit: int) -> list[Datum]:
        """Return a unit's answers as datums with the inputs of every preference loss."""
        first = unit * self.answers.group
        return [self._scored(first + i, datum) for i, datum in enumerate(self.answers.datums(unit))]

    def _scored(self, i: int, datum: Datum) -> Datum:
        inputs = dict(datum.loss_inputs)
        if self.answers.group == 1:
            inputs["desirable"] = np.full(len(datum), self.answers.desirable[i], np.float32)
        if self.logprobs is not None:
            inputs["reference_logprobs"] = np.zeros(len(datum), self.logprobs.dtype)
            places = np.flatnonzero(datum.loss_inputs["weights"])
            inputs["reference_logprobs"][places] = self.logprobs[self.starts[i] : self.starts[i + 1]]
        return Datum(datum.inputs, inputs, datum.key)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The training and the held-out comparisons, scored."""

    train: ScoredAnswers
    held_out: ScoredAnswers | None


@stage(writes="corpus")
async def load_comparisons(dataset_store: DatasetStore, config: ComparisonConfig, run: Run) -> AsyncIterator[Corpus]:
    """Open the comparisons to train on and those that are never trained on."""
    known = KNOWN_COMPARISONS.get(config.dataset, KnownDataset(config.dataset))
    options = dict(known.options) | config.dataset_options
    if config.dataset in TASKS:
        options.setdefault("rows", "pairs")
    split = known.train if config.split == "train" else config.split
    spec = DatasetSpec(
        known.hub_id, split, config.dataset_size, config.seed, config.holdout, tuple(sorted(options.items()))
    )
    yield await open_corpus(dataset_store, spec, config, run, (known.held_out, "validation"))


@stage(writes="data")
async def build_prefs(
    corpus: Corpus, session: TrainingSession, config: ComparisonConfig, run: Run
) -> AsyncIterator[PreferenceData]:
    """Turn all comparisons into tokens before the first step; flawed ones are left out and counted."""
    answers = await _answers(corpus.train, session, config)
    if not len(answers):
        raise EmptyDataset(
            f"{config.dataset!r} has no comparison to learn from: {_counted(answers.flaws) or 'no rows'}",
            hint="a row needs prompt, chosen and rejected, or see the config key fields",
        )
    held_out = None if corpus.held_out is None else await _answers(corpus.held_out, session, config)
    rows_per_step, total_steps = steps_planned(len(answers), config)
    data = PreferenceData(
        name=config.dataset,
        fingerprint=await pin_corpus(corpus, run),
        rows=len(answers),
        rows_per_step=rows_per_step,
        parts=config.gradient_accumulation,
        seed=config.seed,
        shuffle=config.shuffle,
        total_steps=total_steps,
        answers=answers,
        held_out=held_out if held_out is not None and len(held_out) else None,
    )
    _report(data, config, run)
    yield data


def _report(data: PreferenceData, config: ComparisonConfig, run: Run) -> None:
    answers = data.answers
    if answers.flaws:
        run.warn("data.flawed_pairs", f"comparisons were left out: {_counted(answers.flaws)}")
    if answers.tokens.truncated:
        run.warn("data.too_long", f"{answers.tokens.truncated} answers were cut at the longest sequence allowed")
    run.emit(
        DataPrepared(
            dataset=data.name,
            fingerprint=data.fingerprint,
            rows=data.rows,
            tokens=answers.tokens.token_count,
            trained_tokens=answers.tokens.trained_tokens,
            truncated=answers.tokens.truncated,
            steps=data.total_steps,
        )
    )
    run.emit(
        DpoDatasetBuilt(
            num_pairs=data.rows,
            num_batches=data.steps_per_epoch,
            batch_size=config.batch_size,
            dropped=sum(answers.flaws.values()),
            truncated=answers.tokens.truncated,
            flaws=answers.flaws,
        )
    )


def _counted(flaws: Mapping[str, int]) -> str:
    return "; ".join(f"{count} with {reason}" for reason, count in flaws.items())


async def _answers(dataset: Dataset, session: TrainingSession, config: ComparisonConfig) -> Answers:
    parts = []
    for start in range(0, len(dataset), ROWS_PER_CHUNK):
        rows = await dataset.rows(range(start, min(start + ROWS_PER_CHUNK, len(dataset))))
        part = await run_sync(
            render_answers,
            rows,
            session.tokenizer,
            config,
            paired=config.paired,
            first=start,
            split=dataset.split,
            context_length=session.info.context_length,
        )
        parts.append(part)
    return Answers.join(parts)


# --- the frozen reference --------------------------------------------------------------------------------------------


@stage(writes="scored")
async def reference_logprobs(
    session: TrainingSession,
    training_client: TrainingClient,
    blob_store: BlobStore,
    data: PreferenceData,
    config: PreferenceDataConfig,
    run: Run,
) -> AsyncIterator[Scored]:
    """Score all answers under the frozen reference, once: what was scored is kept in the blob store and found again.

    The reference is the model as it is before its first step, so it is the session itself, and nothing is held twice.
    A session that has trained already, or a config that names another ``reference``, opens one of its own for as long
    as the scoring takes. What identifies the scores is a hash of the model and of all tokens.
    """
    sets = [data.answers] if data.held_out is None else [data.answers, data.held_out]
    if not config.has_reference:
        yield Scored(*_attached(data, [ScoredAnswers(a, None, _starts(a)) for a in sets]))
        return
    key = await run_sync(_key, sets, config)

    async def scores() -> list[Array]:
        async with _frozen(session, training_client, config, run) as reference:
            return [array for answers in sets for array in await _score(reference, answers, config)]

    arrays = await kept("reference", key, blob_store, run, scores)
    scored = [
        ScoredAnswers(answers, arrays[2 * i], _starts(answers), arrays[2 * i + 1] if config.loss == "kto" else None)
        for i, answers in enumerate(sets)
    ]
    yield Scored(*_attached(data, scored))


def _attached(data: PreferenceData, scored: list[ScoredAnswers]) -> tuple[ScoredAnswers, ScoredAnswers | None]:
    return scored[0], scored[1] if data.held_out is not None else None


@asynccontextmanager
async def _frozen(
    session: TrainingSession, client: TrainingClient, config: PreferenceDataConfig, run: Run
) -> AsyncGenerator[TrainingSession, None]:
    """Give a session whose weights are the reference's."""
    if session.position == 0 and not config.reference:
        yield session
        return
    spec = await session_spec(config.model_copy(update={"model": config.reference or config.model}), run)
    async with client.open_session(spec) as frozen:
        if not same_tokens(frozen.tokenizer, session.tokenizer):
            raise CapabilityError(
                f"the reference {config.reference!r} has another tokenizer than {config.model!r}",
                hint="give a reference of the same family, or leave it out",
            )
        yield frozen


async def _score(
    reference: TrainingSession, answers: Answers, config: PreferenceDataConfig
) -> tuple[Array, NDArray[np.float64]]:
    """Return the log-probabilities of all answers' tokens, and the sums over mismatched answers (none but for KTO)."""
    own: list[Array] = []
    sums: list[float] = []
    for start in range(0, len(answers.tokens), ANSWERS_PER_CALL):
        span = range(start, min(start + ANSWERS_PER_CALL, len(answers.tokens)))
        own += await answer_logprobs(reference, [answers.tokens.datum(i) for i in span])
        if config.loss == "kto":
            mismatched = await run_sync(_mismatched, answers, span)
            sums += [float(x.sum(dtype=np.float64)) for x in await answer_logprobs(reference, mismatched)]
    return np.concatenate(own), np.array(sums, np.float64)


def _mismatched(answers: Answers, span: Sequence[int]) -> list[Datum]:
    return [answers.mismatched(i) for i in span]


async def answer_logprobs(session: TrainingSession, datums: Sequence[Datum]) -> list[Array]:
    """Return the log-probabilities of each datum's answer: of the tokens that count."""
    result = await (await session.forward(datums))
    return [
        np.asarray(row)[np.flatnonzero(d.loss_inputs["weights"])]
        for row, d in zip(result.logprobs, datums, strict=True)
    ]


def _starts(answers: Answers) -> NDArray[np.int64]:
    counts = np.add.reduceat(answers.tokens.weights, answers.tokens.offsets[:-1], dtype=np.int64)
    counts -= answers.tokens.weights[answers.tokens.offsets[:-1]]  # nothing predicts a first token
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _key(sets: Sequence[Answers], config: PreferenceDataConfig) -> str:
    """Return a hash of everything the reference's scores depend on."""
    digest = hashlib.sha256()
    facts = [config.reference or config.model, config.seed, config.loss == "kto"]
    digest.update(json.dumps(facts).encode())
    for answers in sets:
        for array in (answers.tokens.tokens, answers.tokens.weights, answers.tokens.offsets):
            digest.update(array.tobytes())
    return digest.hexdigest()
