"""The distillation workflow on the noop backend, whose little model really learns, and on torch where files matter."""

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.errors import (
    BackendError,
    CapabilityError,
    ConfigError,
    TransientBackendError,
    WorkflowError,
)
from crucible_kitchen.events import DistillationStep, Event
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.runs import RunResult
from crucible_kitchen.stages.distillation_data import answer_datum
from crucible_kitchen.types import AdamParams
from crucible_kitchen_noop import NoopSamplingClient, NoopTrainingClient
from crucible_kitchen_noop.tokenizer import ByteTokenizer

pytestmark = pytest.mark.anyio

TOKENS = ByteTokenizer()
LETTERS = [answer_datum(TOKENS.encode("?"), [*TOKENS.encode(chr(65 + i)), TOKENS.eos_id], "") for i in range(26)]
METHODS = ("on_policy", "off_policy", "top_k", "gjsd")


class Teaching(NoopTrainingClient):
    """A client whose model ``teacher`` was taught to answer each letter with its capital."""

    @asynccontextmanager
    async def open_session(self, spec: Any) -> AsyncGenerator[Any, None]:
        async with super().open_session(spec) as session:
            for _ in range(20 if spec.model == "teacher" else 0):
                async with session.step(session.position) as step:
                    await step.forward_backward(LETTERS)
                    await (await step.apply(AdamParams(0.3), scale=1 / len(LETTERS)))
            yield session


class Watched(NoopSamplingClient):
    """Served models whose use is counted, and that may fail."""

    def __init__(self, *, fail_after: int = 10**9, error: Exception | None = None, shift: int = 0) -> None:
        super().__init__()
        self.asked: list[tuple[str, str, int]] = []  # model, verb, tokens of the prompt
        self.open = 0
        self._fail_after, self._error, self._shift = fail_after, error, shift

    def used(self, model: str, verb: str, tokens: int) -> None:
        self.asked.append((model, verb, tokens))
        if len(self.asked) > self._fail_after and self._error is not None:
            raise self._error

    @asynccontextmanager
    async def open_sampler(self, model: str) -> AsyncGenerator[Any, None]:
        async with super().open_sampler(model) as sampler:
            self.open += 1
            try:
                yield _WatchedSampler(self, model, sampler, self._shift)
            finally:
                self.open -= 1


class _WatchedSampler:
    def __init__(self, client: Watched, model: str, inner: Any, shift: int) -> None:
        self._client, self._model, self._inner = client, model, inner
        self.version = inner.version
        self.tokenizer = _Shifted(inner.tokenizer, shift) if shift else inner.tokenizer

    async def sample(self, prompt: Sequence[int], params: Any, n: int = 1) -> Any:
        self._client.used(self._model, "sample", len(prompt))
        return await self._inner.sample(prompt, params, n)

    async def compute_logprobs(self, sequences: Sequence[Sequence[int]]) -> Any:
        for sequence in sequences:
            self._client.used(self._model, "score", len(sequence))
        return await self._inner.compute_logprobs(sequences)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Shifted:
    """A tokenizer with other ids for the same text."""

    def __init__(self, inner: Any, shift: int) -> None:
        self._inner, self._shift = inner, shift
        self.vocab_size, self.eos_id = inner.vocab_size, inner.eos_id
        self.prefix_ids, self.chat = inner.prefix_ids, inner.chat

    def encode(self, text: str) -> list[int]:
        return [(i + self._shift) % 256 for i in self._inner.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode([(i - self._shift) % 256 for i in ids]))

    def render_chat(self, messages: Any, *, generation_prompt: bool) -> Any:
        return self._inner.render_chat(messages, generation_prompt=generation_prompt)


def written(path: Path, count: int = 40) -> str:
    rows = [{"prompt": f"{chr(97 + i % 26)}?", "completion": chr(65 + i % 26)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Forty prompts of one letter, and a teacher."""
    return {
        "model": "student",
        "teacher": "teacher",
        "dataset": written(tmp_path / "letters.jsonl"),
        "batch_size": 8,
        "holdout": 8,
        "learning_rate": 0.3,
        "sample_max_tokens": 4,
        "eval_max_tokens": 4,
    }


@pytest.fixture
def kitchen(home: Path) -> Kitchen:
    """A closed kitchen on noop adapters, but for the files that rows come from."""
    return Kitchen({"training_client": Teaching(), "evaluator": "noop", "model_registry": "noop"}, home=home)


async def run(kitchen: Kitchen, config: dict[str, Any], **adapters: Any) -> tuple[RunResult, list[Event]]:
    """Run to the end and return the result and all events."""
    async with kitchen:
        handle = await kitchen.start("distillation", config, adapters=adapters)
        events = [record.event async for record in handle.events()]
        return await handle.wait(), events


def steps(events: list[Event]) -> list[DistillationStep]:
    return [e for e in events if isinstance(e, DistillationStep)]


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_brings_the_student_nearer_to_its_teacher(
    kitchen: Kitchen, config: dict[str, Any], method: str
) -> None:
    quick = {"epochs": 10, "samples_per_prompt": 8, "sample_max_tokens": 1, "learning_rate": 0.1}
    result, events = await run(kitchen, {**config, "method": method, **quick})
    found = [e.divergence for e in steps(events)]
    assert np.mean(found[-4:]) < 0.8 * np.mean(found[:4])
    assert all(e.method == method and e.samples == 64 for e in steps(events)[:3])
    assert result.state.distillation_metrics.keys() == {"loss", "divergence"}
    assert {"accuracy", "n"} <= result.state.teacher_results.keys() & result.state.eval_results.keys()
    assert result.state.registered_model.id.startswith("distillation-student-")


@pytest.mark.parametrize("method", METHODS)
async def test_equal_runs_have_equal_steps(kitchen: Kitchen, config: dict[str, Any], method: str, home: Path) -> None:
    one, two = [
        steps((await run(Kitchen({"training_client": Teaching()}, home=home), {**config, "method": method}))[1])
        for _ in range(2)
    ]
    assert [e.to_json() for e in one] == [e.to_json() for e in two]


async def test_a_served_teacher_answers_once_and_is_released(kitchen: Kitchen, config: dict[str, Any]) -> None:
    served = Watched()
    await run(kitchen, {**config, "method": "off_policy", "epochs": 3}, sampling_client=served)
    lessons = [a for a in served.asked if a[1] == "sample"]
    assert len(lessons) == 32 + 4, "every prompt once, whatever the epochs, and the held-out questions"
    assert served.open == 0


async def test_on_policy_asks_a_served_teacher_for_the_student_s_samples(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    served = Watched()
    _, events = await run(kitchen, {**config, "samples_per_prompt": 2}, sampling_client=served)
    assert len([a for a in served.asked if a[1] == "score"]) == sum(e.samples for e in steps(events)) == 64


async def test_several_teachers_share_prompts_by_weight_or_have_their_own(
    kitchen: Kitchen, config: dict[str, Any], tmp_path: Path
) -> None:
    served = Watched()
    del config["teacher"]
    own = written(tmp_path / "own.jsonl", 20)
    teachers = [{"model": "a", "weight": 3.0}, {"model": "b"}, {"model": "c", "dataset": own}]
    await run(kitchen, {**config, "teachers": teachers, "eval_size": 1}, sampling_client=served)
    asked = [model for model, verb, _ in served.asked if verb == "score"]
    assert len(asked) == 32 + 12
    assert asked.count("c") == 12
    assert asked.count("a") > 1.5 * asked.count("b") > 0


async def test_a_teacher_may_be_told_what_the_student_is_not(kitchen: Kitchen, config: dict[str, Any]) -> None:
    plain, told = Watched(), Watched()
    secret = "Answer in capitals."
    await run(kitchen, config, sampling_client=plain)
    await run(kitchen, {**config, "teacher_system_prompt": secret}, sampling_client=told)
    longest = max(tokens for _, verb, tokens in plain.asked if verb == "score")
    assert min(tokens for _, verb, tokens in told.asked if verb == "score") > len(secret)
    assert longest < len(secret)
    gjsd = {**config, "teacher_system_prompt": secret, "method": "gjsd"}
    assert steps((await run(kitchen, gjsd))[1])[0].divergence > 0


@pytest.mark.parametrize("method", ["on_policy", "top_k", "gjsd"])
async def test_methods_by_token_refuse_a_teacher_with_other_tokens(
    kitchen: Kitchen, config: dict[str, Any], method: str
) -> None:
    served = Watched(shift=1)
    with pytest.raises(CapabilityError, match="another tokenizer") as caught:
        await run(kitchen, {**config, "method": method}, sampling_client=served)
    assert "off_policy" in str(caught.value.hint)
    assert served.open == 0


async def test_a_teacher_with_other_tokens_teaches_by_its_text(kitchen: Kitchen, config: dict[str, Any]) -> None:
    _, events = await run(kitchen, {**config, "method": "off_policy"}, sampling_client=Watched(shift=1))
    assert len(steps(events)) == 4


async def test_all_scores_of_a_served_teacher_are_refused_with_the_alternatives(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    with pytest.raises(CapabilityError, match="scores of every token") as caught:
        await run(kitchen, {**config, "method": "gjsd"}, sampling_client=Watched())
    assert all(name in str(caught.value.hint) for name in ("top_k", "on_policy", "off_policy"))


@pytest.mark.parametrize("method", ["on_policy", "off_policy"])
async def test_a_teacher_that_fails_ends_the_run_with_its_error_and_is_released(
    kitchen: Kitchen, config: dict[str, Any], method: str
) -> None:
    served = Watched(fail_after=12, error=BackendError("the teacher fell asleep"))
    with pytest.raises(BackendError, match="fell asleep") as caught:
        await run(kitchen, {**config, "method": method}, sampling_client=served)
    assert caught.value.where is not None
    assert "distillation/" in caught.value.where
    assert served.open == 0


async def test_a_teacher_that_fails_for_a_moment_is_asked_again(kitchen: Kitchen, config: dict[str, Any]) -> None:
    class Moody(Watched):
        def used(self, model: str, verb: str, tokens: int) -> None:
            super().used(model, verb, tokens)
            if len(self.asked) == 11:
                raise TransientBackendError("not now")

    _, calm = await run(kitchen, config, sampling_client=Watched())
    _, moody = await run(kitchen, config, sampling_client=Moody())
    assert [e.to_json() for e in steps(moody)] == [e.to_json() for e in steps(calm)]


async def test_without_a_teacher_one_is_trained_first_on_a_built_in_task(home: Path) -> None:
    small = {"dataset_size": 32, "eval_size": 4, "batch_size": 16, "sample_max_tokens": 4, "eval_max_tokens": 4}
    kitchen = Kitchen({"training_client": "noop"}, home=home)
    config = {"model": "any", "dataset": "sums", **small, "teacher_training": {"epochs": 2}}
    result, events = await run(kitchen, config)
    assert result.status == "completed"
    kinds = [a.kind for a in result.artifacts]
    assert kinds.count("weights") == 2, "the teacher's and the student's"
    paths = [e.path for e in events if e.name == "stage.start"]
    assert any(path.startswith("distillation/train_teacher/epoch[1]") for path in paths)


async def test_without_a_teacher_other_data_are_refused_with_the_line_to_write(
    kitchen: Kitchen, config: dict[str, Any]
) -> None:
    del config["teacher"]
    with pytest.raises(ConfigError, match="write teacher=MODEL"):
        kitchen.check("distillation", config)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"discount": 0.5, "method": "off_policy"}, "discount has no meaning for method=off_policy"),
        ({"gjsd_beta": 0.4}, "gjsd_beta has no meaning for method=on_policy"),
        ({"top_k": 4, "method": "gjsd"}, "top_k has no meaning"),
        ({"gjsd_beta": 1.5, "method": "gjsd"}, "gjsd_beta"),
        ({"sample_temperature": 0.0}, "sample_temperature"),
        ({"teachers": [{"model": "x"}]}, "give teacher or teachers, not both"),
        ({"teacher_training": {"eval_every": 3}}, "teacher_training.eval_every"),
    ],
)
async def test_a_key_that_would_do_nothing_is_refused(
    kitchen: Kitchen, config: dict[str, Any], keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        kitchen.check("distillation", {**config, **keys})


@pytest.mark.parametrize(
    ("method", "lacks", "hint"),
    [
        ("top_k", {"topk_logprobs": False}, "distil on-policy"),
        ("gjsd", {"full_logits": False}, "top tokens"),
        ("on_policy", {"custom_loss": "refused"}, "off_policy"),
        ("on_policy", {"sampling": False}, "off_policy"),
    ],
)
async def test_what_a_backend_cannot_is_refused_before_the_run(
    kitchen: Kitchen, config: dict[str, Any], method: str, lacks: dict[str, Any], hint: str
) -> None:
    class Poorer(NoopTrainingClient):
        @property
        def capabilities(self) -> Any:
            return replace(super().capabilities, **lacks)

    with pytest.raises(WorkflowError, match=hint):
        kitchen.check(
            "distillation", {**config, "method": method}, adapters={"training_client": Poorer(), "evaluator": None}
        )


async def test_a_registered_model_teaches_under_its_name(home: Path) -> None:
    small = {"model": "tiny", "dataset": "sums", "dataset_size": 16, "batch_size": 8, "eval_size": 2}
    async with Kitchen(home=home) as kitchen:
        taught = await kitchen.run("supervised", {**small, "register_as": "teacher"})
        config = {**small, "teacher": taught.state.registered_model.id, "sample_max_tokens": 3, "eval_max_tokens": 3}
        result = await kitchen.run("distillation", config)
    assert result.status == "completed"
    assert result.state.teacher_results["n"] == 2


async def test_the_manifest_says_whether_a_run_can_be_repeated(kitchen: Kitchen, config: dict[str, Any]) -> None:
    assert not kitchen.check("distillation", config).manifest["reproducible"]
    assert kitchen.check("distillation", {**config, "sampling": "deterministic"}).manifest["reproducible"]
