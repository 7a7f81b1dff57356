"""Distillation data: the method's keys, and prompts as student and teacher see them.

It knows ports and tokenizers, no loss. Read next: ``crucible_kitchen.stages.lessons``.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from crucible_kitchen.config import refuse_unused
from crucible_kitchen.errors import CapabilityError, EmptyDataset
from crucible_kitchen.events import DataPrepared
from crucible_kitchen.ports import Dataset, DatasetSpec, DatasetStore, EvalExample, TrainingSession
from crucible_kitchen.rendering import eval_example, same_tokens
from crucible_kitchen.stages.data import (
    ROWS_PER_CHUNK,
    Corpus,
    QuestionedPlan,
    SupervisedDataConfig,
    held_out_questions,
    steps_planned,
)
from crucible_kitchen.stages.teachers import Teacher, TeacherConfig, Teachers
from crucible_kitchen.types import Array, Datum, IntArray, Row
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run, seed_of
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "DistillationData",
    "DistillationDataConfig",
    "MethodConfig",
    "Prompt",
    "answer_datum",
    "build_prompts",
]

_OWN_KEYS: Mapping[str, tuple[str, ...]] = {
    "top_k": ("top_k",),
    "top_k_rest": ("top_k",),
    "discount": ("on_policy",),
    "kl_coef": ("on_policy",),
    "baseline": ("on_policy",),
    "gjsd_beta": ("gjsd",),
    "gjsd_temperature": ("gjsd",),
    "on_policy_share": ("gjsd",),
}


class MethodConfig(TeacherConfig):
    """How the student learns from its teachers."""

    method: Literal["on_policy", "off_policy", "top_k", "gjsd"] = "on_policy"
    """``on_policy``: the student samples, the teacher's log-probabilities are the reward. ``off_policy``: trained on
    the teacher's samples. ``top_k``: on its likeliest tokens. ``gjsd``: on all of its scores."""

    samples_per_prompt: int = Field(default=1, ge=1)
    """Answers sampled per prompt."""

    sample_max_tokens: int = Field(default=64, ge=1)
    """Longest answer that is sampled."""

    sample_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the samples."""

    sampling: Literal["fast", "deterministic"] = "fast"
    """``deterministic``: samples are the same bits whatever else runs; ``fast`` merges requests as it likes, so that a
    near-tie may fall the other way."""

    top_k: int = Field(default=16, ge=1)
    """How many of the teacher's likeliest tokens the student is shown."""

    top_k_rest: Literal["renormalize", "tail"] = "renormalize"
    """What becomes of its other tokens: nothing is left to them, or they count as one."""

    discount: float = Field(default=0.0, ge=0, le=1)
    """How much a sampled token answers for the divergence of those after it."""

    kl_coef: float = Field(default=1.0, gt=0)
    """Advantage per nat of divergence."""

    baseline: Literal["batch", "none"] = "batch"
    """What is taken off the advantages: their mean over the step's tokens, which only lowers the noise, or nothing."""

    gjsd_beta: float = Field(default=0.5, ge=0, le=1)
    """0: forward KL, 1: reverse KL, between them the generalised JSD."""

    gjsd_temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions that are compared."""

    on_policy_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the optimizer steps of ``gjsd`` whose answers the student samples; the teacher samples the others."""

    def unrepeatable(self) -> str | None:
        """See ``RunConfig``."""
        if self.sampling == "fast":
            return "sampling=fast merges requests as they come: set sampling=deterministic"
        return super().unrepeatable()

    @property
    def needs_lessons(self) -> bool:
        """Whether the teachers' own samples are trained on."""
        return self.method in ("off_policy", "top_k") or (self.method == "gjsd" and self.on_policy_share < 1)

    @model_validator(mode="after")
    def _keys_belong_to_the_method(self) -> Self:
        refuse_unused(self, "method", _OWN_KEYS)
        return self


class DistillationDataConfig(SupervisedDataConfig, MethodConfig):
    """What preparing distillation depends on."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        key: its stable name.
        student: its tokens as the student sees them.
        teacher: its tokens as its teacher sees them, which may be told more.
        by: the number of its teacher.
    """

    key: str
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    by: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DistillationData(QuestionedPlan):
    """Everything distilled on and evaluated on.

    Attributes:
        prompts: what is asked.
        teacher_examples: held-out questions as the first teacher sees them.
    """

    prompts: tuple[Prompt, ...]
    teacher_examples: tuple[EvalExample, ...]


def answer_datum(
    prompt: Sequence[int], answer: Sequence[int] | IntArray, key: str, inputs: Mapping[str, Array] | None = None
) -> Datum:
    """Return a prompt with an answer as a datum on whose answer alone something is trained.

    Args:
        prompt: tokens.
        answer: tokens, one or more.
        key: of the datum.
        inputs: more loss inputs, each of the answer's length [A, ...]; on the prompt they are 0.
    """
    tokens = np.concatenate([np.asarray(prompt, np.int64), np.asarray(answer, np.int64)])
    plain = Datum.from_tokens(tokens, np.arange(len(tokens)) >= len(prompt), key)
    wide = {name: _padded(values, len(plain)) for name, values in (inputs or {}).items()}
    return Datum(plain.inputs, {**plain.loss_inputs, **wide}, key)


def _padded(values: Array, length: int) -> Array:
    whole = np.zeros((length, *values.shape[1:]), values.dtype)
    whole[length - len(values) :] = values
    return whole


@stage(writes="data")
async def build_prompts(
    corpus: Corpus,
    teachers: Teachers,
    session: TrainingSession,
    dataset_store: DatasetStore,
    config: DistillationDataConfig,
    run: Run,
) -> AsyncIterator[DistillationData]:
    """Write every prompt as student and teacher see it, and refuse a teacher that cannot be compared token by token."""
    first = teachers.members[0]
    for teacher in teachers.members:
        _check_comparable(teacher, session, config)
    prompts, fingerprint, dropped = await _prompts(corpus, teachers, session, dataset_store, config)
    if not prompts:
        raise EmptyDataset(
            f"no prompt of {config.dataset!r} leaves room for an answer of {config.sample_max_tokens} tokens",
            hint="lower sample_max_tokens",
        )
    if dropped:
        run.warn("data.too_long", f"{dropped} prompts leave no room for an answer and are left out")
    rows_per_step, total_steps = steps_planned(len(prompts), config)
    data = DistillationData(
        name=config.dataset,
        fingerprint=fingerprint,
        rows=len(prompts),
        rows_per_step=rows_per_step,
        parts=config.gradient_accumulation,
        seed=config.seed,
        shuffle=config.shuffle,
        total_steps=total_steps,
        examples=await held_out_questions(corpus.held_out, session.tokenizer, session.info.context_length, config, run),
        prompts=prompts,
        teacher_examples=await held_out_questions(
            corpus.held_out, first.tokenizer, first.context_length, _told(first, config), run
        ),
    )
    run.emit(
        DataPrepared(
            dataset=data.name,
            fingerprint=fingerprint,
            rows=data.rows,
            tokens=sum(len(p.student) for p in prompts),
            trained_tokens=0,
            truncated=0,
            steps=data.total_steps,
        )
    )
    yield data


def _check_comparable(teacher: Teacher, session: TrainingSession, config: MethodConfig) -> None:
    if config.method != "off_policy" and not same_tokens(teacher.tokenizer, session.tokenizer):
        raise CapabilityError(
            f"the teacher {teacher.spec.model!r} has another tokenizer than the student, and method={config.method} "
            "compares them token by token",
            hint="method=off_policy trains on the teacher's text; or take a teacher of the student's family",
        )
    if config.method == "gjsd" and (teacher.session is None or not teacher.session.capabilities.full_logits):
        raise CapabilityError(
            f"the teacher {teacher.spec.model!r} does not give the scores of every token",
            hint="method=top_k takes its likeliest tokens, on_policy its log-probabilities, off_policy its samples",
        )


async def _prompts(
    corpus: Corpus,
    teachers: Teachers,
    session: TrainingSession,
    dataset_store: DatasetStore,
    config: DistillationDataConfig,
) -> tuple[tuple[Prompt, ...], str, int]:
    """Return all prompts, the hash of the rows they are from, and how many left no room."""
    found: list[Prompt] = []
    prints, dropped = [], 0
    for name in dict.fromkeys(teacher.spec.dataset for teacher in teachers.members):
        own = [i for i, teacher in enumerate(teachers.members) if teacher.spec.dataset == name]
        dataset = corpus.train if not name else await dataset_store.load(_spec(name, config))
        prints.append(await dataset.fingerprint())
        for start in range(0, len(dataset), ROWS_PER_CHUNK):
            rows = await dataset.rows(range(start, min(start + ROWS_PER_CHUNK, len(dataset))))
            part = await run_sync(_written, rows, start, dataset, own, teachers, session, config)
            found += [prompt for prompt in part if prompt is not None]
            dropped += part.count(None)
    fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()
    return tuple(found), fingerprint, dropped


def _spec(name: str, config: DistillationDataConfig) -> DatasetSpec:
    return DatasetSpec(name, config.split, config.dataset_size, config.seed, config.holdout)


def _written(
    rows: Sequence[Row],
    first: int,
    dataset: Dataset,
    own: Sequence[int],
    teachers: Teachers,
    session: TrainingSession,
    config: DistillationDataConfig,
) -> list[Prompt | None]:
    """Write rows' prompts; each goes to one of the dataset's teachers, drawn by weight from the seed and its place."""
    weights = np.cumsum([teachers.members[i].spec.weight for i in own])
    label = f"{dataset.name}/" if any(t.spec.dataset for t in teachers.members) else ""
    written: list[Prompt | None] = []
    for index, row in enumerate(rows, first):
        draw = np.random.default_rng(seed_of(config.seed, dataset.name, str(index))).random() * weights[-1]
        by = own[int(np.searchsorted(weights, draw, side="right"))]
        teacher = teachers.members[by]
        student = eval_example(row, session.tokenizer, config, index=index).prompt
        taught = eval_example(row, teacher.tokenizer, _told(teacher, config), index=index).prompt
        prompt = Prompt(f"{label}{dataset.split}/{index}", student, taught, by)
        written.append(prompt if _fits(prompt, teacher, session, config) else None)
    return written


def _told(teacher: Teacher, config: DistillationDataConfig) -> DistillationDataConfig:
    """Return the config by which rows are written for a teacher."""
    if not teacher.system_prompt:
        return config
    return config.model_copy(update={"system_prompt": teacher.system_prompt})


def _fits(prompt: Prompt, teacher: Teacher, session: TrainingSession, config: DistillationDataConfig) -> bool:
    room = min(config.max_length, session.info.context_length)
    at_teacher = teacher.context_length
    fits_teacher = not at_teacher or len(prompt.teacher) + config.sample_max_tokens <= at_teacher
    return 0 < len(prompt.student) <= room - config.sample_max_tokens and fits_teacher
