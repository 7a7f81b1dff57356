"""Distillation stages: optimizer steps that bring a student nearer to its teachers, and how good the teachers are.

They know sessions, samplers and the learner's losses, no backend. Read next:
``crucible_kitchen.learner.distillation``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio
import numpy as np

from crucible_kitchen.config import EvalConfig, OptimConfig
from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.events import DistillationStep
from crucible_kitchen.learner.distillation import GeneralizedJSD, TopKForwardKL, reverse_kl_advantages
from crucible_kitchen.learner.policy import ImportanceSampling
from crucible_kitchen.learner.terms import Term, WeightedSum
from crucible_kitchen.ports import Evaluator, Sampler, TrainingClient, TrainingSession, require_outputs
from crucible_kitchen.stages.data import Batch
from crucible_kitchen.stages.distillation_data import DistillationData, MethodConfig, Prompt, answer_datum
from crucible_kitchen.stages.evaluation import ask_questions, reported
from crucible_kitchen.stages.lessons import Lessons
from crucible_kitchen.stages.teachers import Teachers
from crucible_kitchen.stages.training import take_step
from crucible_kitchen.types import Array, Datum, IntArray, Loss, OutputsLoss, Sampled, SamplingParams, StepResult
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run, seed_of
from crucible_kitchen.workflow.stage import stage

__all__ = ["DistillationStepConfig", "distill_step", "evaluate_teacher", "log_distillation"]


class DistillationStepConfig(OptimConfig, MethodConfig):
    """What an optimizer step of distillation depends on."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer to a prompt: its tokens, and where it was sampled their log-probabilities there."""

    prompt: Prompt
    tokens: IntArray
    logprobs: Array


@stage(writes="step")
async def distill_step(
    session: TrainingSession,
    batch: Batch,
    data: DistillationData,
    teachers: Teachers,
    config: DistillationStepConfig,
    lessons: Lessons | None = None,
) -> StepResult:
    """Get answers to a batch of prompts, compare student and teacher on them, and apply one optimizer step.

    A step that is tried again samples the same answers: their seeds are made of the run's, the step and the prompt.
    The loss is a mean per answer token over all of the step's, however they are split.
    """
    step = session.position
    if lessons is None or (config.method == "gjsd" and _student_samples(step, config)):
        answers = await _sampled(session, batch, data, config, step)
    else:
        answers = _said(batch, data, lessons, config)
    work = await _compared(answers, teachers, config, batch, lessons)
    tokens = sum(len(a.tokens) for a in answers)
    parts = _split(work.datums, config, data, batch)
    result = await take_step(session, parts, work.loss, config, data, batch, divisor=tokens)
    divergence = work.divergence(result, tokens)
    return replace(
        result,
        metrics={**result.metrics, "divergence": divergence, "samples": float(len(answers)), "answer_tokens": tokens},
    )


@distill_step.validate
def _backend_can(training_client: TrainingClient, config: MethodConfig) -> None:
    can = training_client.capabilities
    reads = {"top_k": ("top_logprobs",), "gjsd": ("logits",)}.get(config.method, ())
    require_outputs(can, reads)
    if config.method != "off_policy" and can.custom_loss == "refused":
        raise CapabilityError(
            f"the training backend takes no loss such as that of method={config.method}", hint="method=off_policy"
        )
    if config.method in ("on_policy", "gjsd") and not can.sampling:
        raise CapabilityError("the training backend cannot sample from the student", hint="method=off_policy or top_k")
    if config.method in ("on_policy", "gjsd") and config.sampling != "fast" and not can.sampling_options:
        raise CapabilityError("the training backend samples in its own way", hint="set sampling=fast")


def _student_samples(step: int, config: MethodConfig) -> bool:
    """Whether the student samples in this step of a method that mixes: drawn from the run's seed and the step."""
    draw = np.random.default_rng(seed_of(config.seed, "on_policy_share", str(step))).random()
    return bool(draw < config.on_policy_share)


def _split(
    datums: Sequence[Datum], config: MethodConfig, data: DistillationData, batch: Batch
) -> list[Sequence[Datum]]:
    """Return the datums of each submission of the step; a prompt's answers stay together."""
    parts, start = [], 0
    for rows in data.submissions(batch):
        end = start + len(rows) * config.samples_per_prompt
        parts.append(datums[start:end])
        start = end
    return parts


# --- answers ---------------------------------------------------------------------------------------------------------


async def _sampled(
    session: TrainingSession, batch: Batch, data: DistillationData, config: MethodConfig, step: int
) -> list[_Answer]:
    """Let the student answer, all prompts at once."""
    sampler = await session.sampler()
    found: list[list[Sampled]] = [[] for _ in batch.rows]
    params = SamplingParams(
        max_tokens=config.sample_max_tokens,
        temperature=config.sample_temperature,
        mode=config.sampling,
    )

    async def ask(place: int, row: int) -> None:
        own = replace(params, seed=seed_of(config.seed, f"step{step}", str(row)) % 2**62)
        found[place] = await sampler.sample(data.prompts[row].student, own, config.samples_per_prompt)

    try:
        async with anyio.create_task_group() as group:
            for place, row in enumerate(batch.rows):
                group.start_soon(ask, place, row)
    finally:
        await _closed(sampler)
    return [
        _Answer(data.prompts[row], sampled.tokens, sampled.logprobs)
        for row, said in zip(batch.rows, found, strict=True)
        for sampled in said
    ]


async def _closed(sampler: Sampler) -> None:
    with anyio.CancelScope(shield=True):
        await sampler.aclose()


def _said(batch: Batch, data: DistillationData, lessons: Lessons, config: MethodConfig) -> list[_Answer]:
    """Return what the teachers answered."""
    spans = [(row, lessons.span(row, i)) for row in batch.rows for i in range(config.samples_per_prompt)]
    return [_Answer(data.prompts[row], lessons.tokens[span], lessons.logprobs[span]) for row, span in spans]


# --- comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """Datums, the loss they are trained with, and how the divergence is read from a step's result.

    ``known`` is the mean over tokens of what the teacher's side of the divergence is already known to be.
    """

    datums: Sequence[Datum]
    loss: str | Loss | OutputsLoss
    known: float | None = None
    metric: str = ""

    def divergence(self, result: StepResult, tokens: int) -> float:
        """Return the divergence of a step, nats per token; that of the loss where the teacher's side is not known."""
        if self.metric:
            return result.metrics[self.metric] / tokens
        return self.known if self.known is not None else result.loss


async def _compared(
    answers: Sequence[_Answer],
    teachers: Teachers,
    config: DistillationStepConfig,
    batch: Batch,
    lessons: Lessons | None,
) -> _Work:
    match config.method:
        case "on_policy":
            return await _against_teachers(answers, teachers, config)
        case "off_policy":
            return _imitated(answers)
        case "top_k":
            assert lessons is not None, "made before the first step"
            return _shown(answers, lessons, batch, config)
        case "gjsd":
            return await _distributions(answers, teachers, config)


async def _against_teachers(answers: Sequence[_Answer], teachers: Teachers, config: DistillationStepConfig) -> _Work:
    """Make the reverse KL per token the (negative) reward of what the student sampled."""
    scores = await _teacher_logprobs(answers, teachers)
    own = [np.asarray(answer.logprobs, np.float64) for answer in answers]
    advantages = [
        reverse_kl_advantages(student, teacher, coefficient=config.kl_coef, discount=config.discount)
        for student, teacher in zip(own, scores, strict=True)
    ]
    baseline = float(np.concatenate(advantages).mean()) if config.baseline == "batch" else 0.0
    datums = [
        answer_datum(
            answer.prompt.student,
            answer.tokens,
            answer.prompt.key,
            {"logprobs": answer.logprobs, "advantages": (advantage - baseline).astype(np.float32)},
        )
        for answer, advantage in zip(answers, advantages, strict=True)
    ]
    known = float((np.concatenate(own) - np.concatenate(scores)).mean())
    return _Work(datums, ImportanceSampling(), known=known)


async def _teacher_logprobs(answers: Sequence[_Answer], teachers: Teachers) -> list[Array]:
    """Return each answer's log-probabilities under its teacher; all teachers are asked at once."""
    found: list[Array] = [np.zeros(0)] * len(answers)

    async def ask(number: int) -> None:
        mine = [i for i, a in enumerate(answers) if a.prompt.by == number]
        sequences = [[*answers[i].prompt.teacher, *map(int, answers[i].tokens)] for i in mine]
        rows = await teachers.members[number].sampler.compute_logprobs(sequences)
        for i, row in zip(mine, rows, strict=True):
            found[i] = np.asarray(row, np.float64)[-len(answers[i].tokens) :]

    async with anyio.create_task_group() as group:
        for number in {a.prompt.by for a in answers}:
            group.start_soon(ask, number)
    return found


def _imitated(answers: Sequence[_Answer]) -> _Work:
    """Train on the teachers' answers."""
    datums = [answer_datum(a.prompt.student, a.tokens, a.prompt.key) for a in answers]
    return _Work(datums, "cross_entropy")


def _shown(answers: Sequence[_Answer], lessons: Lessons, batch: Batch, config: DistillationStepConfig) -> _Work:
    """Train on the teachers' likeliest tokens at each position of their answers."""
    spans = [lessons.span(row, i) for row in batch.rows for i in range(config.samples_per_prompt)]
    datums = [
        answer_datum(
            a.prompt.student,
            a.tokens,
            a.prompt.key,
            {"teacher_tokens": lessons.top_tokens[span], "teacher_logprobs": lessons.top_logprobs[span]},
        )
        for a, span in zip(answers, spans, strict=True)
    ]
    loss = WeightedSum(Term(TopKForwardKL(rest=config.top_k_rest), "top_logprobs"))
    return _Work(datums, loss, metric="kl")


async def _distributions(answers: Sequence[_Answer], teachers: Teachers, config: DistillationStepConfig) -> _Work:
    """Compare whole distributions at each position of the answers."""
    datums: list[Datum | None] = [None] * len(answers)
    for number in sorted({a.prompt.by for a in answers}):
        mine = [i for i, a in enumerate(answers) if a.prompt.by == number]
        asked = [answer_datum(answers[i].prompt.teacher, answers[i].tokens, answers[i].prompt.key) for i in mine]
        session = teachers.members[number].session
        assert session is not None, "checked when the prompts were built"
        logits = (await (await session.forward(asked, outputs=("logits",)))).outputs["logits"]
        for i, rows in zip(mine, logits, strict=True):
            a = answers[i]
            own = answer_datum(a.prompt.student, a.tokens, a.prompt.key)
            seen = rows if a.prompt.student == a.prompt.teacher else await run_sync(_moved, rows, len(a.tokens), own)
            datums[i] = Datum(own.inputs, {**own.loss_inputs, "teacher_logits": seen}, own.key)
    loss = GeneralizedJSD(beta=config.gjsd_beta, temperature=config.gjsd_temperature)
    return _Work([d for d in datums if d is not None], WeightedSum(Term(loss, "logits")), metric="jsd")


def _moved(rows: Array, answer: int, own: Datum) -> Array:
    """Return a teacher's scores at the student's positions: both see the same answer behind prompts of their own."""
    found = np.asarray(rows[len(rows) - answer :])
    whole = np.zeros((len(own), found.shape[-1]), found.dtype)
    whole[len(own) - answer :] = found
    return whole


# --- reports ---------------------------------------------------------------------------------------------------------


@stage(writes="distillation_metrics")
async def log_distillation(step: StepResult, config: MethodConfig, run: Run) -> dict[str, float]:
    """Report a step's loss and how far the student is from its teachers."""
    metrics = step.metrics
    run.emit(
        DistillationStep(
            step=step.step,
            method=config.method,
            loss=step.loss,
            divergence=metrics["divergence"],
            samples=int(metrics["samples"]),
            tokens=int(metrics["answer_tokens"]),
        )
    )
    return {"loss": step.loss, "divergence": metrics["divergence"]}


@stage(writes="teacher_results")
async def evaluate_teacher(
    teachers: Teachers, data: DistillationData, config: EvalConfig, run: Run, evaluator: Evaluator | None = None
) -> dict[str, Any]:
    """Ask the first teacher the held-out questions: what the student can hope for."""
    assert evaluator is not None, "guarded by evaluator_given"
    teacher = teachers.members[0]
    report = await ask_questions(evaluator, teacher.sampler, data.teacher_examples, config, teacher.context_length)
    synthetic = teacher.session is not None and teacher.session.capabilities.synthetic
    return reported(report, teacher.sampler.version, run, synthetic=synthetic)
