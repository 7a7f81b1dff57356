"""Lessons: what teachers say to the prompts of a distillation run, sampled once and kept in the blob store.

They know samplers and tokenizers, no loss. Read next: ``crucible_kitchen.stages.distillation``.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import anyio
import numpy as np
from numpy.typing import NDArray

from crucible_kitchen.ports import BlobStore, TrainingSession
from crucible_kitchen.rendering import same_tokens
from crucible_kitchen.stages.distillation_data import DistillationData, DistillationDataConfig, MethodConfig, Prompt
from crucible_kitchen.stages.kept import kept
from crucible_kitchen.stages.teachers import Teachers
from crucible_kitchen.types import Array, IntArray, Sampled, SamplingParams
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run, seed_of
from crucible_kitchen.workflow.stage import stage

__all__ = ["Lessons", "teacher_lessons"]

PROMPTS_AT_ONCE = 64  # prompts that a teacher is asked concurrently


@dataclass(frozen=True, slots=True, eq=False)
class Lessons:
    """What the teachers said to all prompts: answers in the student's tokens.

    Attributes:
        per_prompt: answers per prompt; those of one prompt follow each other.
        tokens: int64, all answers one after the other.
        starts: int64 [answers + 1].
        logprobs: float32, of each token under the teacher; NaN where they are not known.
        top_tokens: int64 [tokens, k], the teacher's likeliest tokens; k may be 0.
        top_logprobs: float32 [tokens, k], theirs.
    """

    per_prompt: int
    tokens: IntArray
    starts: IntArray
    logprobs: NDArray[np.float32]
    top_tokens: IntArray
    top_logprobs: NDArray[np.float32]

    def span(self, prompt: int, number: int) -> slice:
        """Return where an answer stands."""
        at = prompt * self.per_prompt + number
        return slice(int(self.starts[at]), int(self.starts[at + 1]))


@stage(writes="lessons")
async def teacher_lessons(
    data: DistillationData,
    teachers: Teachers,
    session: TrainingSession,
    blob_store: BlobStore,
    config: DistillationDataConfig,
    run: Run,
) -> AsyncIterator[Lessons | None]:
    """Let the teachers answer every prompt, once: what they said is kept in the blob store and found again."""
    if not config.needs_lessons:
        yield None
        return
    facts = [t.spec.model_dump() for t in teachers.members]
    asked = [config.seed, config.samples_per_prompt, config.sample_max_tokens, config.sample_temperature, _k(config)]
    prompts = [[p.student, p.teacher, p.by] for p in data.prompts]
    key = hashlib.sha256(json.dumps([facts, asked, prompts]).encode()).hexdigest()

    async def taught() -> Sequence[Array]:
        return await _taught(data, teachers, session, config)

    yield Lessons(config.samples_per_prompt, *await kept("data", key, blob_store, run, taught))


def _k(config: MethodConfig) -> int:
    return config.top_k if config.method == "top_k" else 0


async def _taught(
    data: DistillationData, teachers: Teachers, session: TrainingSession, config: DistillationDataConfig
) -> Sequence[Array]:
    params = SamplingParams(
        max_tokens=config.sample_max_tokens,
        temperature=config.sample_temperature,
        top_logprobs=_k(config),
        mode=config.sampling,
    )
    answers: list[Sampled] = []
    for start in range(0, len(data.prompts), PROMPTS_AT_ONCE):
        chunk = data.prompts[start : start + PROMPTS_AT_ONCE]
        for prompt, said in zip(chunk, await _asked(chunk, teachers, params, config, start), strict=True):
            teacher = teachers.members[prompt.by]
            same = same_tokens(teacher.tokenizer, session.tokenizer)
            answers += said if same else [_retold(sampled, session, config) for sampled in said]
    return await run_sync(_joined, answers, _k(config))


async def _asked(
    chunk: Sequence[Prompt], teachers: Teachers, params: SamplingParams, config: MethodConfig, first: int
) -> list[list[Sampled]]:
    """Ask the teachers concurrently."""
    found: list[list[Sampled]] = [[] for _ in chunk]

    async def ask(place: int, prompt: Prompt) -> None:
        own = replace(params, seed=seed_of(config.seed, "lessons", str(first + place)) % 2**62)
        sampler = teachers.members[prompt.by].sampler
        found[place] = await sampler.sample(prompt.teacher, own, config.samples_per_prompt)

    async with anyio.create_task_group() as group:
        for place, prompt in enumerate(chunk):
            group.start_soon(ask, place, prompt)
    return found


def _retold(sampled: Sampled, session: TrainingSession, config: DistillationDataConfig) -> Sampled:
    """Return what a teacher with other tokens said, in the student's; nothing is known of its log-probabilities."""
    ended = [session.tokenizer.eos_id] if sampled.stop_reason == "stop" else []
    tokens = np.array([*session.tokenizer.encode(sampled.text), *ended], np.int64)[: config.sample_max_tokens]
    if not len(tokens):
        tokens = np.array([session.tokenizer.eos_id], np.int64)
    return replace(sampled, tokens=tokens, logprobs=np.full(len(tokens), np.nan, np.float32))


def _joined(answers: Sequence[Sampled], k: int) -> Sequence[Array]:
    tokens = np.concatenate([a.tokens for a in answers]).astype(np.int64)
    tops = [(a.top_tokens, a.top_logprobs) for a in answers if a.top_tokens is not None and a.top_logprobs is not None]
    none = np.zeros((len(tokens), 0))
    return [
        tokens,
        np.cumsum([0, *(len(a.tokens) for a in answers)], dtype=np.int64),
        np.concatenate([a.logprobs for a in answers]).astype(np.float32),
        np.concatenate([ids for ids, _ in tops]).astype(np.int64) if k else none.astype(np.int64),
        np.concatenate([lp for _, lp in tops]).astype(np.float32) if k else none.astype(np.float32),
    ]
