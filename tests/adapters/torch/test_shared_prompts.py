"""Samples that share the keys and values of their prompt: what they get is what they would get alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_kitchen.types import LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen_torch import kvcache
from crucible_kitchen_torch.decoding import Decoding, Job
from crucible_kitchen_torch.kvcache import Slots
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.trainer import Trainer

PARAMS = SamplingParams(seed=1)
PROMPTS = [(7, 8), (9, 10, 11, 12, 13), tuple(range(20, 45))]
NEVER = 1 << 40


class Asker:
    """Whoever asked for samples; keeps nothing."""

    cancelled = False

    def deliver(self, index, sampled):
        raise NotImplementedError  # a decoding returns what ended, its sampler delivers it

    def fail(self, error):
        raise NotImplementedError


def trainer(tmp_path, model="tiny", lora=None, dtype="float32"):
    options = TorchOptions("cpu", dtype, 1, 4096, deterministic=False)
    return Trainer(SessionSpec(str(model), lora, 0, str(tmp_path)), options)


def jobs(prompt, lengths, seed, **more):
    asker = Asker()
    params = replace(PARAMS, **more)
    return [Job(asker, i, prompt, params, length, seed) for i, length in enumerate(lengths)]


def decoded(t, asked):
    """Decode jobs that come together to their ends: the samples in their order."""
    batch = Decoding(t, t.weights.snapshot(0))
    batch.join(asked)
    found = {}
    while batch.jobs:
        found.update(batch.advance())
    return [found[job] for job in asked]


@pytest.fixture
def shared(monkeypatch):
    """The length of every prompt that was shared; all that two samples ask for are."""
    lengths = []
    put = Slots.put

    def counted(self, rows, pairs, prompt, length, upto):
        put(self, rows, pairs, prompt, length, upto)
        lengths.extend([length] if self._prompts[rows[0]] else [])

    monkeypatch.setattr(Slots, "put", counted)
    monkeypatch.setattr(kvcache, "WORTH_SHARING", 1)
    return lengths


@pytest.mark.parametrize("family", ["tiny", "llama", "Mistral", "Gemma3", "Qwen3", "GPT2"])
def test_they_have_the_log_probabilities_of_the_training_pass_and_of_transformers(
    tmp_path, llama, random_model, shared, family
):
    """Groups of query heads, windows shorter than the prompt and learned positions included."""
    directory = {"tiny": "tiny", "llama": llama}.get(family) or random_model(family)
    t = trainer(tmp_path, directory)
    asked = [job for seed, prompt in enumerate(PROMPTS) for job in jobs(prompt, (20, 20, 3, 20), seed)]
    samples = decoded(t, asked)
    assert sorted(shared) == [2, 5, 25]
    rows = [[*job.prompt, *s.tokens.tolist()] for job, s in zip(asked, samples, strict=True)]
    for job, row, sample in zip(asked, rows, samples, strict=True):
        with torch.no_grad():
            scores = t.model.head(t.model.hidden(torch.tensor(row), [len(row)]))
            references = [scores] if family == "tiny" else [scores, plain(directory)(torch.tensor([row])).logits[0]]
        for found in references:
            logprobs = found.log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            np.testing.assert_allclose(sample.logprobs, logprobs[len(job.prompt) - 1 :], rtol=0, atol=1e-5)


def plain(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_adapters_in_training_are_sampled_with(tmp_path, llama, shared):
    t = trainer(tmp_path, llama, LoraSpec(4))
    before = decoded(t, jobs(PROMPTS[2], (8, 8), 3))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in t.weights.trained.values():
            p.add_(0.1 * torch.randn_like(p))
    after = decoded(t, jobs(PROMPTS[2], (8, 8), 3))
    assert shared == [25, 25]
    row = torch.tensor([*PROMPTS[2], *after[0].tokens])
    with torch.no_grad():
        logprobs = t.model.head(t.model.hidden(row, [len(row)])).log_softmax(-1)[:-1].gather(1, row[1:, None])[:, 0]
    np.testing.assert_allclose(after[0].logprobs, logprobs[24:], rtol=0, atol=1e-5)
    assert np.abs(after[0].logprobs[0] - before[0].logprobs[0]) > 1e-3


GROUP = st.tuples(
    st.integers(0, 12),  # the turn in which it comes
    st.integers(1, 30),  # tokens of its prompt
    st.lists(st.integers(1, 14), min_size=1, max_size=5),  # tokens to draw for each sample
    st.none() | st.integers(0, 10),  # turns after which it is cancelled
)


@pytest.mark.parametrize("kind", ["tiny", "llama"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(GROUP, min_size=1, max_size=5), st.integers(1, 60))
def test_whoever_joins_ends_or_is_cancelled_nobody_notices_the_others(
    tmp_path, llama, kind, monkeypatch, groups, worth
):
    """In float64: groups of any size and prompts of any length, some shared and some not, at any time."""
    t = trainer(tmp_path, "tiny" if kind == "tiny" else llama, dtype="float64")
    coming = [(turn, jobs(tuple(range(3, 3 + n)), lengths, i), end) for i, (turn, n, lengths, end) in enumerate(groups)]
    found = {}
    batch = Decoding(t, t.weights.snapshot(0))
    with monkeypatch.context() as patch:
        patch.setattr(kvcache, "WORTH_SHARING", worth)
        for turn in range(40):
            batch.join([job for at, asked, _ in coming for job in asked if at == turn])
            for at, asked, end in coming:
                asked[0].request.cancelled |= end is not None and turn == at + end
            found.update(batch.advance())
    assert not batch.jobs
    for i, (_, asked, end) in enumerate(coming):
        for job in asked:
            assert job in found or end is not None
            if job not in found:
                continue
            with monkeypatch.context() as patch:
                patch.setattr(kvcache, "WORTH_SHARING", NEVER)
                (alone,) = decoded(t, [Job(Asker(), job.index, job.prompt, job.params, job.length, i)])
            assert found[job].tokens.tolist() == alone.tokens.tolist()
            np.testing.assert_allclose(found[job].logprobs, alone.logprobs, rtol=0, atol=1e-6)


def test_a_shared_prompt_is_stored_once_and_given_up_with_its_last_sample(tmp_path, shared):
    t = trainer(tmp_path)
    batch = Decoding(t, t.weights.snapshot(0))
    one, two = jobs(PROMPTS[2], (9, 4, 4), 1, temperature=0.0), jobs(PROMPTS[1], (12, 12), 2, temperature=0.0)
    batch.join([*one, *two])
    columns, prompts = [], []
    while batch.jobs:
        batch.advance()
        slots = batch._slots
        columns.append(slots._pairs[0][0].shape[2] if slots else 0)
        prompts.append(len({p for p in slots._prompts if p}) if slots else 0)
    assert shared == [25, 5]
    assert max(columns) < 25
    assert max(prompts) == 2
    assert prompts[-2:] == [1, 0]


@pytest.mark.parametrize("why", ["deterministic", "bfloat16", "few", "no attention function"])
def test_where_sharing_does_not_apply_rows_are_whole(tmp_path, llama, shared, monkeypatch, why):
    if why == "few":
        monkeypatch.setattr(kvcache, "WORTH_SHARING", 26)
    if why == "no attention function":
        monkeypatch.setattr("crucible_kitchen_torch.huggingface.use_unpadded", lambda _: False)
    t = trainer(tmp_path, llama, dtype="bfloat16" if why == "bfloat16" else "float32")
    batch = Decoding(t, t.weights.snapshot(0), 128 if why == "deterministic" else None)
    batch.join(asked := jobs(PROMPTS[2], (6, 6), 1))
    while batch.jobs:
        batch.advance()
    assert shared == []
    assert [len(job.draws.tokens) for job in asked] == [6, 6]
