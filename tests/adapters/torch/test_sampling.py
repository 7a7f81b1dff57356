"""Sampling: the distribution that is drawn from, merging, stopping, and frozen weights."""

from dataclasses import replace

import anyio
import numpy as np
import pytest
import torch

from crucible_kitchen.errors import BackendUserError, SessionLost
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.decoding import Decoding
from crucible_kitchen_torch.drawing import Draws, draw

pytestmark = pytest.mark.anyio

SEEDED = SamplingParams(max_tokens=10, seed=3)


def session(tmp_path, model="tiny", lora=None, **options):
    return TorchTrainingClient(threads=1, **options).open_session(SessionSpec(str(model), lora, 0, str(tmp_path)))


def drawn(scores, params, count=4000):
    rows = [Draws(params, 0, i) for i in range(count)]
    tokens = draw(torch.tensor([scores]).repeat(count, 1), rows)
    logprobs = [row.logprobs[0] for row in rows]
    return np.bincount(tokens, minlength=len(scores)) / count, dict(zip(tokens, logprobs, strict=True))


def expected(scores, params):
    """The processed distribution, the slow way: temperature, then top-k, then top-p."""
    p = np.exp(np.array(scores) / params.temperature)
    p /= p.sum()
    order = list(np.argsort(-p, kind="stable"))
    if params.top_k:
        order = order[: params.top_k]
    kept, mass, total = [], 0.0, p[order].sum()
    for token in order:
        if mass / total >= params.top_p:
            break
        kept.append(token)
        mass += p[token]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.5, top_k=4, top_p=0.8),
    ],
)
def test_draws_follow_the_processed_distribution_and_report_it(params):
    scores = [2.0, -1.0, 1.5, 0.0, 0.5]
    want = expected(scores, params)
    frequencies, logprobs = drawn(scores, params)
    assert np.abs(frequencies - want).max() < 0.03
    for token, logprob in logprobs.items():
        assert logprob == pytest.approx(np.log(want[token]), abs=1e-5)


def test_rows_of_one_batch_keep_their_own_settings():
    scores = torch.tensor([[2.0, 1.9, -5.0]] * 3)
    mixed = [
        Draws(SamplingParams(temperature=0), 0, 0),
        Draws(SamplingParams(top_k=1), 0, 0),
        Draws(SamplingParams(), 0, 0),
    ]
    tokens = draw(scores, mixed)
    logprobs = [row.logprobs[0] for row in mixed]
    assert (tokens[:2], logprobs[:2]) == ([0, 0], [0.0, 0.0])
    assert logprobs[2] < -0.1


@pytest.mark.parametrize("kind", ["tiny", "llama"])
async def test_merged_requests_get_what_they_get_alone(tmp_path, llama, kind):
    async with session(tmp_path, llama if kind == "llama" else "tiny", tokens_per_microbatch=16) as opened:
        sampler = await opened.sampler()
        prompts = [[7], [9, 10, 11, 12, 13], list(range(20, 45))]
        alone = [await sampler.sample(p, replace(SEEDED, seed=i), 2) for i, p in enumerate(prompts)]
        merged = {}

        async def one(i):
            merged[i] = await sampler.sample(prompts[i], replace(SEEDED, seed=i), 2)

        async with anyio.create_task_group() as group:
            for i in range(3):
                group.start_soon(one, i)
        for i, prompt in enumerate(prompts):
            for a, b in zip(alone[i], merged[i], strict=True):
                assert a.tokens.tolist() == b.tokens.tolist()
                scored = (await sampler.compute_logprobs([[*prompt, *a.tokens]]))[0][len(prompt) - 1 :]
                np.testing.assert_allclose(scored, b.logprobs, atol=1e-4)


async def test_requests_that_wait_at_the_same_time_share_their_steps(tmp_path, monkeypatch):
    joined = []
    join = Decoding.join

    def counted(self, jobs):
        joined.append(len(jobs))
        join(self, jobs)

    monkeypatch.setattr(Decoding, "join", counted)
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        async with anyio.create_task_group() as group:
            for i in range(8):
                group.start_soon(sampler.sample, [i + 1], SEEDED, 3)
    assert joined == [24]


@pytest.mark.parametrize("lora", [None, LoraSpec(4)], ids=["all", "lora"])
async def test_a_sampler_answers_with_its_own_weights_while_training_goes_on(tmp_path, lora):
    async with session(tmp_path, lora=lora) as opened:
        sampler = await opened.sampler()
        params = replace(SEEDED, max_tokens=60)
        before = await sampler.sample([5], params, 2)
        during = []

        async def sample():
            during.extend(await sampler.sample([5], params, 2))

        async with anyio.create_task_group() as group:
            group.start_soon(sample)
            for k in range(5):
                async with opened.step(k) as step:
                    await step.forward_backward([Datum.from_tokens([5, 6, 7], [1] * 3)])
                    await (await step.apply(AdamParams(0.1)))
        assert [s.tokens.tolist() for s in before] == [s.tokens.tolist() for s in during]
        after = await (await opened.sampler()).sample([5], params, 2)
        assert [s.tokens.tolist() for s in before] != [s.tokens.tolist() for s in after]
        assert (before[0].version, during[0].version, after[0].version) == (0, 0, 5)


async def test_a_stop_text_of_several_tokens_ends_the_text_before_it(tmp_path):
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        params = replace(SEEDED, max_tokens=40)
        for seed in range(20):
            whole = (await sampler.sample([5], replace(params, seed=seed)))[0]
            stop = whole.text[3:6]
            if len(stop) == 3 and "\ufffd" not in whole.text[:8]:
                break
        stopped = (await sampler.sample([5], replace(params, seed=seed, stop=(stop, "never there"))))[0]
        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert stopped.stop_reason == "stop"
        assert stopped.tokens.tolist() == whole.tokens.tolist()[: len(stopped.tokens)]


async def test_the_end_of_the_context_ends_a_sample(tmp_path, llama):
    async with session(tmp_path, llama) as opened:
        sampler = await opened.sampler()
        (sample,) = await sampler.sample([5] * 250, replace(SEEDED, max_tokens=100, temperature=0))
        assert len(sample.tokens) <= 6
        for prompt in ([5] * 256, [300], [-1], []):
            with pytest.raises(BackendUserError):
                await sampler.sample(prompt, SEEDED)
        for params in (replace(SEEDED, top_p=0.0), replace(SEEDED, temperature=-1.0), replace(SEEDED, top_k=-1)):
            with pytest.raises(BackendUserError):
                await sampler.sample([5], params)


async def test_nothing_to_draw_is_refused_and_the_session_stays_usable(tmp_path):
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        for tokens, samples in ((0, 1), (-1, 1), (4, 0)):
            with pytest.raises(BackendUserError, match="1 or more"):
                await sampler.sample([5], replace(SEEDED, max_tokens=tokens), samples)
        assert len(await sampler.sample([5], SEEDED, 2)) == 2


async def test_requests_without_a_seed_take_theirs_from_the_session(tmp_path):
    found = []
    for _ in range(2):
        async with session(tmp_path) as opened:
            sampler = await opened.sampler()
            found.append([(await sampler.sample([5], replace(SEEDED, seed=None)))[0].tokens.tolist() for _ in range(2)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


async def test_a_cancelled_sample_frees_its_rows(tmp_path):
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(sampler.sample, [5], replace(SEEDED, max_tokens=2000), 64)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        with anyio.fail_after(20):
            assert len(await sampler.sample([5], SEEDED, 2)) == 2


async def test_closing_a_sampler_ends_its_requests(tmp_path):
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()

        async def close():
            await anyio.wait_all_tasks_blocked()
            await sampler.aclose()
            await sampler.aclose()

        async with anyio.create_task_group() as group:
            group.start_soon(close)
            with pytest.raises(SessionLost):
                await sampler.sample([5], replace(SEEDED, max_tokens=2000), 64)
        with pytest.raises(SessionLost):
            await sampler.sample([5], SEEDED)
        with pytest.raises(SessionLost):
            await sampler.compute_logprobs([[1, 2]])


async def test_log_probabilities_of_single_tokens_are_empty(tmp_path):
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        one, two = await sampler.compute_logprobs([[5], [5, 6]])
        assert (one.shape, two.shape, two.dtype) == ((0,), (1,), np.float32)
        with pytest.raises(BackendUserError):
            await sampler.compute_logprobs([[]])
