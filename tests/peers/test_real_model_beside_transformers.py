"""A pretrained model of 135M parameters gives the scores and the text that transformers gives, sampled or trained."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crucible_kitchen.testing.models import small_instruct_model
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

TEXTS = (
    "Gravity is",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return",
    "Once upon a time there was a small house at the edge of a large forest. In it lived an old man who",
)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def gguf_model() -> Path:
    """The model, fetched once: a failure to fetch it fails, since nothing else is tested here."""
    return small_instruct_model()


@pytest.fixture(scope="module")
def peer(gguf_model: Path) -> tuple[Any, Any]:
    """The model and its tokenizer as transformers load them."""
    import torch
    import transformers

    given = {"gguf_file": gguf_model.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf_model.parent, dtype=torch.float32, **given)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(gguf_model.parent, **given)


@pytest.fixture(scope="module")
async def session(gguf_model: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> AsyncIterator[Any]:
    """The model in a session of LoRA, whose adapters begin at zero."""
    spec = SessionSpec(str(gguf_model), LoraSpec(8), 0, str(tmp_path_factory.mktemp("session")))
    async with TorchTrainingClient(threads=2).open_session(spec) as opened:
        yield opened


def prompts(peer: tuple[Any, Any]) -> list[list[int]]:
    return [peer[1].encode(text) for text in TEXTS]


async def test_log_probabilities_of_packed_rows_are_those_of_each_row_alone(
    session: Any, peer: tuple[Any, Any]
) -> None:
    import torch

    ids = prompts(peer)
    found = (await (await session.forward([Datum.from_tokens(i, [1.0] * len(i)) for i in ids]))).logprobs
    for row, given in zip(found, ids, strict=True):
        with torch.no_grad():
            scores = peer[0](torch.tensor([given])).logits[0].log_softmax(-1)
        expected = scores[:-1].gather(1, torch.tensor(given[1:])[:, None])[:, 0]
        np.testing.assert_allclose(row, expected.numpy(), rtol=0, atol=1e-4)


async def test_greedy_samples_asked_for_at_once_are_what_generate_writes(session: Any, peer: tuple[Any, Any]) -> None:
    import anyio
    import torch

    ids, found = prompts(peer), {}
    sampler = await session.sampler()

    async def ask(i: int) -> None:
        (found[i],) = await sampler.sample(ids[i], SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0))

    async with anyio.create_task_group() as group:
        for i in range(len(ids)):
            group.start_soon(ask, i)
    for i, given in enumerate(ids):
        tokens = torch.tensor([given])
        mask = torch.ones_like(tokens)
        whole = peer[0].generate(tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert list(found[i].tokens) == whole[0, len(given) :].tolist()


async def test_samples_have_the_log_probabilities_of_the_training_pass_before_and_after_a_step(
    session: Any, peer: tuple[Any, Any]
) -> None:
    ids = prompts(peer)
    for _ in range(2):
        sampler = await session.sampler()
        for given in ids:
            samples = await sampler.sample(given, SamplingParams(max_tokens=NEW_TOKENS, seed=3), 2)
            scored = await sampler.compute_logprobs([[*given, *s.tokens] for s in samples])
            for sample, row in zip(samples, scored, strict=True):
                np.testing.assert_allclose(sample.logprobs, row[len(given) - 1 :], rtol=0, atol=1e-4)
        async with session.step(session.position) as step:
            gradient = await step.forward_backward([Datum.from_tokens(i, [1.0] * len(i)) for i in ids])
            applied = await step.apply(AdamParams(1e-3), scale=0.02)
            await gradient
            await applied
