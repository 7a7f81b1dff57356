"""Evaluation stages: really ask the model held-out questions, keep the best state, write the report.

They know the evaluator port and a session's sampler. With no evaluator the result is absent, never zero. Read next:
``crucible_kitchen.ports.evaluator``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio

from crucible_kitchen.config import EvalConfig, HeldOutConfig
from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.events import EvalComplete, TrainingCheckpoint
from crucible_kitchen.ports import (
    BlobStore,
    EvalExample,
    EvalReport,
    Evaluator,
    Prediction,
    Sampler,
    TrainingClient,
    TrainingSession,
)
from crucible_kitchen.stages.data import QuestionedPlan
from crucible_kitchen.types import SamplingParams, StateRef, StepResult
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = [
    "Best",
    "ModelPredictor",
    "ask_questions",
    "best_was_kept",
    "eval_at_start",
    "eval_due",
    "evaluate",
    "evaluator_given",
    "keep_best",
    "report_possible",
    "reported",
    "restore_best",
    "stop_early",
    "write_report",
]

FORMATS: tuple[tuple[Literal["markdown", "json", "html"], str], ...] = (
    ("markdown", "report.md"),
    ("json", "report.json"),
    ("html", "report.html"),
)


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far.

    Attributes:
        accuracy: its accuracy.
        step: the optimizer step it was made at.
        waited: evaluations since then that were not better.
        state: where the training state was saved, if ``save_best`` asks for it.
    """

    accuracy: float
    step: int
    waited: int = 0
    state: StateRef | None = None


def evaluator_given(data: QuestionedPlan, evaluator: Evaluator | None) -> bool:
    """Whether there is somebody to evaluate, and something to evaluate on."""
    return evaluator is not None and bool(data.examples)


def eval_at_start(data: QuestionedPlan, config: HeldOutConfig, evaluator: Evaluator | None) -> bool:
    """Whether the model is measured before the first step."""
    return config.eval_at_start and evaluator_given(data, evaluator)


def eval_due(step: StepResult, data: QuestionedPlan, config: HeldOutConfig, evaluator: Evaluator | None) -> bool:
    """Whether this step is one after which the model is measured."""
    return bool(config.eval_every) and step.step % config.eval_every == 0 and evaluator_given(data, evaluator)


@stage(writes="eval_results")
async def evaluate(
    session: TrainingSession, data: QuestionedPlan, config: EvalConfig, run: Run, evaluator: Evaluator | None = None
) -> dict[str, Any]:
    """Ask the model the held-out questions and measure its answers."""
    assert evaluator is not None, "guarded by evaluator_given"
    sampler = await session.sampler()
    try:
        report = await ask_questions(evaluator, sampler, data.examples, config, session.info.context_length)
    finally:
        with anyio.CancelScope(shield=True):
            await sampler.aclose()
    return reported(report, session.position, run, synthetic=session.capabilities.synthetic)


async def ask_questions(
    evaluator: Evaluator, sampler: Sampler, examples: Sequence[EvalExample], config: EvalConfig, context_length: int
) -> EvalReport:
    """Ask a model questions and measure its answers.

    Args:
        evaluator: who measures.
        sampler: the model.
        examples: the questions, each of which leaves room for an answer.
        config: how they are asked.
        context_length: of the model, in tokens; 0 where it is not known.
    """
    predictor = ModelPredictor(sampler, config, context_length)
    return await evaluator.evaluate(predictor, examples, average=config.eval_average, seed=config.seed)


def reported(report: EvalReport, step: int, run: Run, *, synthetic: bool) -> dict[str, Any]:
    """Report an evaluation, and return it as the state has it."""
    metrics = dict(report.metrics)
    run.emit(
        EvalComplete(
            step=step,
            sample_count=report.n,
            accuracy=metrics["accuracy"],
            f1=metrics["f1"],
            precision=metrics["precision"],
            recall=metrics["recall"],
            label=run.path.rpartition("/")[2],
        )
    )
    return metrics | {
        "n": report.n,
        "average": report.average,
        "intervals": {name: list(interval) for name, interval in report.intervals.items()},
        "mistakes": list(report.mistakes),
        "step": step,
        "synthetic": report.synthetic or synthetic,
    }


@evaluate.validate
def _can_sample(training_client: TrainingClient, evaluator: Evaluator | None = None) -> None:
    if evaluator is not None and not training_client.capabilities.sampling:
        raise CapabilityError(
            "the training backend cannot sample, so nothing can be evaluated",
            hint="give no evaluator: --adapter evaluator=none",
        )


class ModelPredictor:
    """The model as an evaluator sees it: generates an answer, or chooses the likeliest of candidate labels."""

    def __init__(self, sampler: Sampler, config: EvalConfig, context_length: int) -> None:
        self._sampler = sampler
        self._config = config
        self._context = context_length

    async def __call__(self, examples: Sequence[EvalExample]) -> list[Prediction]:
        """Answer the examples concurrently; the sampler merges what waits at the same time."""
        answers: list[Prediction | None] = [None] * len(examples)

        async def answer(index: int, example: EvalExample) -> None:
            answers[index] = await (self._choose(example) if example.labels else self._generate(example))

        async with anyio.create_task_group() as group:
            for index, example in enumerate(examples):
                group.start_soon(answer, index, example)
        return [a for a in answers if a is not None]

    async def _generate(self, example: EvalExample) -> Prediction:
        longest = self._config.eval_max_tokens
        room = min(longest, self._context - len(example.prompt)) if self._context else longest
        params = SamplingParams(max_tokens=room, temperature=0.0, seed=0)
        (sample,) = await self._sampler.sample(example.prompt, params)
        return Prediction(example.key, sample.text)

    async def _choose(self, example: EvalExample) -> Prediction:
        encoded = [self._sampler.tokenizer.encode(label) for label in example.labels]
        sequences = [[*example.prompt, *ids] for ids in encoded]
        logprobs = await self._sampler.compute_logprobs(sequences)
        scores = {
            label: float(row[-len(ids) :].sum())
            for label, ids, row in zip(example.labels, encoded, logprobs, strict=True)
        }
        return Prediction(example.key, max(scores, key=lambda label: scores[label]), scores)


@stage(writes="best")
async def keep_best(
    session: TrainingSession, eval_results: dict[str, Any], config: HeldOutConfig, run: Run, best: Best | None = None
) -> Best:
    """Compare an evaluation with the best so far; save the state of a better one if ``save_best`` asks for it."""
    accuracy = float(eval_results["accuracy"])
    if best is not None and accuracy <= best.accuracy:
        return Best(best.accuracy, best.step, best.waited + 1, best.state)
    state = None
    if config.save_best:
        state = await (await session.save_state(f"best-{session.position:06d}"))
        run.emit(TrainingCheckpoint(step=state.step, path=state.uri))
    return Best(accuracy, session.position, 0, state)


def stop_early(config: HeldOutConfig, best: Best | None = None) -> bool:
    """Whether too many evaluations in a row were not better than the best."""
    return bool(config.early_stopping) and best is not None and best.waited >= config.early_stopping


def best_was_kept(best: Best | None = None) -> bool:
    """Whether there is a best state to return to."""
    return best is not None and best.state is not None


@stage()
async def restore_best(session: TrainingSession, best: Best | None = None) -> None:
    """Return to the best state, if training went on after it."""
    if best is not None and best.state is not None and session.position != best.step:
        await session.load_state(best.state)


def report_possible(evaluator: Evaluator | None) -> bool:
    """Whether there is somebody to render a report."""
    return evaluator is not None


@stage()
async def write_report(
    eval_results: dict[str, Any], run: Run, evaluator: Evaluator | None = None, blob_store: BlobStore | None = None
) -> None:
    """Write the evaluation's report as Markdown, JSON and HTML into the run's directory and the blob store."""
    assert evaluator is not None, "guarded by evaluator_given"
    report = report_of(eval_results)
    for kind, name in FORMATS:
        path = run.directory / name
        document = await evaluator.render(report, kind)
        await run_sync(Path.write_text, path, document, encoding="utf-8")
        if blob_store is not None:
            run.add_artifact(await blob_store.put_file(path, kind="report", name=name))


def report_of(results: Mapping[str, Any]) -> EvalReport:
    """Return the report that ``evaluate`` took its results from."""
    facts = {"n", "average", "intervals", "mistakes", "step", "synthetic"}
    return EvalReport(
        metrics={name: value for name, value in results.items() if name not in facts},
        intervals={name: (low, high) for name, (low, high) in results["intervals"].items()},
        n=results["n"],
        average=results["average"],
        mistakes=tuple(results["mistakes"]),
        synthetic=results["synthetic"],
    )
