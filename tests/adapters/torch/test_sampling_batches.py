"""Continuous batching: who joins when, what rows get, and the mode in which nobody notices the others."""

import threading
from dataclasses import replace

import anyio
import numpy as np
import pytest
import torch

from crucible_kitchen.errors import BackendUserError, CapabilityError, ConfigError, SessionLost
from crucible_kitchen.types import Datum, SamplingParams, SessionSpec
from crucible_kitchen.workers import waker
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.decoding import Decoding
from crucible_kitchen_torch.sampling import Limits, TorchSampler

pytestmark = pytest.mark.anyio

PARAMS = SamplingParams(max_tokens=24, seed=1)
PROMPTS = [[7], [9, 10, 11, 12, 13], list(range(20, 45)), [5] * 40, list(range(60, 90)), [3, 4]]


def session(tmp_path, model="tiny", **options):
    return TorchTrainingClient(threads=1, **options).open_session(SessionSpec(str(model), None, 0, str(tmp_path)))


@pytest.fixture(params=["tiny", "llama"])
def model(request, llama):
    return "tiny" if request.param == "tiny" else llama


@pytest.fixture
def turns(monkeypatch):
    """Every turn of every batch: how many samples it held."""
    held = []
    advance = Decoding.advance

    def counted(self):
        held.append(len(self.jobs))
        return advance(self)

    monkeypatch.setattr(Decoding, "advance", counted)
    return held


def limited(sampler, **limits):
    return TorchSampler(sampler._trainer, sampler._snapshot, sampler._turns, sampler._group, Limits(**limits))


async def at_once(sampler, requests):
    """Ask for everything at the same time; return the samples in order."""
    found = {}

    async def ask(i, prompt, params, n):
        found[i] = await sampler.sample(prompt, params, n)

    async with anyio.create_task_group() as group:
        for i, request in enumerate(requests):
            group.start_soon(ask, i, *request)
    return [found[i] for i in range(len(requests))]


def bits(samples):
    return [(s.tokens.tolist(), s.logprobs.tobytes(), s.text, s.stop_reason) for s in samples]


async def test_who_arrives_while_a_batch_runs_has_a_token_after_two_steps(tmp_path, model, monkeypatch):
    ended = []
    advance = Decoding.advance

    def counted(self):
        ended.append([])
        ended[-1] = advance(self)
        return ended[-1]

    monkeypatch.setattr(Decoding, "advance", counted)
    async with session(tmp_path, model) as opened:
        sampler = await opened.sampler()
        async with anyio.create_task_group() as group:
            group.start_soon(sampler.sample, [5], replace(PARAMS, max_tokens=200), 8)
            with anyio.fail_after(60):
                while len(ended) < 10:
                    await anyio.lowlevel.checkpoint()
            before = len(ended)
            await sampler.sample([65] * 40, replace(PARAMS, max_tokens=1))
            first = next(turn for turn, jobs in enumerate(ended) if any(len(job.prompt) == 40 for job, _ in jobs))
            assert first < before + 2
            group.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("lengths", "ends"),
    [
        ([12], [12]),
        ([40], [16, 32, 40]),
        ([1, 12], [1, 12]),  # the shortest is told at once
        ([8, 40], [12, 28, 40]),  # one of 8 tokens four tokens later
        ([8, 11, 40], [12, 28, 40]),  # with whatever else has ended by then
        ([8, 13, 40], [12, 19, 35, 40]),
        ([10, 12], [12]),  # or as soon as nothing is drawn any more
        ([15, 40], [16, 32, 40]),
    ],
)
async def test_a_sample_that_ends_waits_for_others_half_of_its_tokens_at_most(tmp_path, monkeypatch, lengths, ends):
    """Turns of the lane end when the first sample that has ended may not wait longer."""
    turns = []
    turn = TorchSampler._advance
    steps = []
    advance = Decoding.advance

    def stepped(self):
        steps.append(len(self.jobs))
        return advance(self)

    def counted(self, *arguments):
        turn(self, *arguments)
        turns.append(len(steps))

    monkeypatch.setattr(Decoding, "advance", stepped)
    monkeypatch.setattr(TorchSampler, "_advance", counted)
    async with session(tmp_path) as opened:
        samples = await at_once(
            await opened.sampler(), [([7], replace(PARAMS, seed=0, max_tokens=n), 1) for n in lengths]
        )
    assert [len(s.tokens) for (s,) in samples] == lengths, "none may have ended by itself"
    assert turns == ends


async def test_a_sample_that_ended_before_an_error_of_the_same_turn_is_told(tmp_path, monkeypatch):
    advance, steps = Decoding.advance, []

    def failing(self):
        steps.append(len(self.jobs))
        if len(steps) == 10:
            raise BackendUserError("the tenth step fails")
        return advance(self)

    monkeypatch.setattr(Decoding, "advance", failing)
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        outcomes = {}

        async def ask(tokens):
            try:
                outcomes[tokens] = await sampler.sample([7], replace(PARAMS, seed=0, max_tokens=tokens))
            except BackendUserError as error:
                outcomes[tokens] = error

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(ask, 8)
                group.start_soon(ask, 40)
    assert len(outcomes[8][0].tokens) == 8
    assert "the tenth step fails" in str(outcomes[40])


async def test_a_sample_that_ended_in_a_turn_is_told_when_the_session_closes_within_that_turn(tmp_path, monkeypatch):
    advance, steps = Decoding.advance, []
    tenth, wake, told = anyio.Event(), waker(), threading.Event()

    def held(self):
        steps.append(len(self.jobs))
        if len(steps) == 10:
            wake(tenth.set)
            assert told.wait(60), "while the session closes, nobody hears of the sample"
        return advance(self)

    monkeypatch.setattr(Decoding, "advance", held)
    outcomes = {}

    async def ask(sampler, tokens):
        try:
            outcomes[tokens] = await sampler.sample([7], replace(PARAMS, seed=0, max_tokens=tokens))
        except SessionLost as error:
            outcomes[tokens] = error
        if len(outcomes) == 2:
            told.set()

    async with anyio.create_task_group() as group:
        async with session(tmp_path) as opened:
            sampler = await opened.sampler()
            group.start_soon(ask, sampler, 8)
            group.start_soon(ask, sampler, 40)
            with anyio.fail_after(60):
                await tenth.wait()
    assert len(outcomes[8][0].tokens) == 8
    assert isinstance(outcomes[40], SessionLost)


async def test_rows_that_end_leave_early_and_their_places_go_to_those_who_wait(tmp_path, turns):
    async with session(tmp_path) as opened:
        sampler = limited(await opened.sampler(), rows=2)
        lengths = [40, 3, 3, 3]
        await at_once(sampler, [([7], replace(PARAMS, max_tokens=n, seed=n), 1) for n in lengths])
        assert max(turns) == 2
        assert len(turns) <= 45  # the short ones came one after the other beside the long one


async def test_the_cache_is_bounded_and_a_request_beyond_the_bound_runs_alone(tmp_path, turns):
    async with session(tmp_path) as opened:
        sampler = limited(await opened.sampler(), cache_tokens=60)
        requests = [([5] * 10, replace(PARAMS, max_tokens=10, seed=i), 1) for i in range(4)]
        await at_once(sampler, [*requests, ([5] * 80, replace(PARAMS, max_tokens=4), 1)])
        assert max(turns) == 3


async def test_samples_of_one_prompt_read_it_once(tmp_path, model, monkeypatch):
    read = []
    async with session(tmp_path, model) as opened:
        inner = opened.trainer.model.next_scores

        def counted(tokens, *rest):
            read.append(tuple(tokens.shape))
            return inner(tokens, *rest)

        sampler = await opened.sampler()
        await sampler.sample([5], PARAMS)  # whatever a first sample needs
        read.clear()
        monkeypatch.setattr(opened.trainer.model, "next_scores", counted)
        await sampler.sample([5] * 30, PARAMS, 8)
        assert read == [(1, 30)]


@pytest.mark.parametrize("budget", [8, 1024])
async def test_logits_agree_whatever_is_merged(tmp_path, model, budget):
    """Log-probabilities of the whole vocabulary, alone and merged, and those of the training forward pass."""
    size = 262 if model == "tiny" else 300
    asked = replace(PARAMS, top_logprobs=size, raw_logprobs=True)
    async with session(tmp_path, model, tokens_per_microbatch=budget) as opened:
        sampler = await opened.sampler()
        merged = await at_once(sampler, [(p, replace(asked, seed=i), 2) for i, p in enumerate(PROMPTS)])
        for i, prompt in enumerate(PROMPTS):
            alone = await sampler.sample(prompt, replace(asked, seed=i), 2)
            for a, b in zip(alone, merged[i], strict=True):
                assert a.tokens.tolist() == b.tokens.tolist()
                np.testing.assert_allclose(spread(a, size), spread(b, size), atol=1e-5, rtol=1e-5)
                (trained,) = await sampler.compute_logprobs([[*prompt, *b.tokens]])
                np.testing.assert_allclose(trained[len(prompt) - 1 :], b.logprobs, atol=1e-5)
                np.testing.assert_allclose(b.raw_logprobs, b.logprobs, atol=1e-6)


def spread(sample, size):
    """[T, V]: log-probabilities by token."""
    out = np.zeros((len(sample.tokens), size))
    np.put_along_axis(out, sample.top_tokens, sample.top_logprobs, axis=1)
    return out


async def test_deterministic_samples_have_the_same_bits_whatever_else_runs(tmp_path, model):
    params = replace(PARAMS, mode="deterministic")
    wanted = [(p, replace(params, seed=10 * i), 3) for i, p in enumerate(PROMPTS)]
    noise = [
        ([8] * n, replace(PARAMS, max_tokens=n, mode=mode), 2) for n in (5, 30) for mode in ("fast", "deterministic")
    ]
    async with session(tmp_path, model) as opened:
        sampler = await opened.sampler()
        alone = [bits(await sampler.sample(*request)) for request in wanted]
        together = await at_once(sampler, wanted)
        crowded = await at_once(sampler, [*noise, *reversed(wanted), *noise])
        assert [bits(s) for s in together] == alone
        assert [bits(s) for s in crowded[len(noise) : -len(noise)]] == alone[::-1]


async def test_deterministic_samples_that_need_the_same_row_take_turns(tmp_path, turns):
    params = replace(PARAMS, mode="deterministic", max_tokens=6)
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        found = await at_once(sampler, [([i + 1], replace(params, seed=3), 1) for i in range(3)])
        assert [len(s[0].tokens) for s in found] == [6, 6, 6]
        assert max(turns) == 1
        (many,) = await at_once(sampler, [([5], params, 40)])
        assert len(many) == 40


async def test_a_cancelled_request_gives_its_place_to_the_next(tmp_path):
    async with session(tmp_path) as opened:
        sampler = limited(await opened.sampler(), rows=1)
        async with anyio.create_task_group() as group:
            group.start_soon(sampler.sample, [5], replace(PARAMS, max_tokens=2000))
            await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(0):
                await sampler.sample([5], replace(PARAMS, max_tokens=2000))
            group.cancel_scope.cancel()
        with anyio.fail_after(20):
            await sampler.sample([5], PARAMS)


async def test_closing_a_sampler_that_decodes_in_both_modes_leaves_the_session_as_it_was(tmp_path, turns):
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        ended = []

        async def ask(mode):
            with pytest.raises(SessionLost):
                await sampler.sample([7], replace(PARAMS, seed=0, max_tokens=900, mode=mode))
            ended.append(mode)

        async with anyio.create_task_group() as group:
            group.start_soon(ask, "deterministic")
            group.start_soon(ask, "fast")
            with anyio.fail_after(60):
                while len(turns) < 9:
                    await anyio.lowlevel.checkpoint()
            await sampler.aclose()
        assert sorted(ended) == ["deterministic", "fast"]
        (sample,) = await (await opened.sampler()).sample([7], replace(PARAMS, seed=0, max_tokens=2))
        assert len(sample.tokens) == 2


async def test_an_error_ends_the_requests_of_its_batch_and_the_sampler_stays_usable(tmp_path, monkeypatch):
    async with session(tmp_path) as opened:
        sampler = await opened.sampler()
        want = bits(await sampler.sample([5], PARAMS))
        with monkeypatch.context() as patch:
            patch.setattr("crucible_kitchen_torch.kvcache.Slots.step", broken)
            with pytest.raises(Exception, match="torch failed: broken"):
                await sampler.sample([5], PARAMS, 3)
        assert bits(await sampler.sample([5], PARAMS)) == want


def broken(*_):
    raise RuntimeError("broken")


async def test_rescored_samples_have_the_log_probabilities_of_the_training_pass_to_the_last_bit(tmp_path, model):
    async with session(tmp_path, model) as opened:
        sampler = await opened.sampler()
        samples = await sampler.sample([5, 6, 7], replace(PARAMS, rescore=True, prompt_logprobs=True), 6)
        datums = [Datum.from_tokens([5, 6, 7, *s.tokens], [1.0] * (3 + len(s.tokens))) for s in samples]
        trained = (await (await opened.forward(datums))).logprobs
        for sample, logprobs in zip(samples, trained, strict=True):
            assert sample.logprobs.tobytes() == logprobs[2:].tobytes()
            np.testing.assert_allclose(sample.prompt_logprobs, logprobs[:2], atol=1e-5)
        for params in (replace(PARAMS, temperature=0.5), replace(PARAMS, top_k=3), replace(PARAMS, top_p=0.5)):
            with pytest.raises(BackendUserError, match="rescore"):
                await sampler.sample([5], replace(params, rescore=True))


async def test_raw_and_likeliest_log_probabilities_are_those_of_the_models_own_distribution(tmp_path, model):
    params = replace(PARAMS, temperature=0.7, top_k=5, raw_logprobs=True, top_logprobs=4)
    async with session(tmp_path, model) as opened:
        sampler = await opened.sampler()
        (sample,) = await sampler.sample([5, 6], params)
        (trained,) = await sampler.compute_logprobs([[5, 6, *sample.tokens]])
        np.testing.assert_allclose(sample.raw_logprobs, trained[1:], atol=1e-5)
        assert np.abs(sample.raw_logprobs - sample.logprobs).max() > 1e-3
        assert sample.top_tokens.shape == sample.top_logprobs.shape == (len(sample.tokens), 4)
        assert (np.diff(sample.top_logprobs, axis=1) <= 0).all()
        (greedy,) = await sampler.sample([5, 6], replace(params, temperature=0.0))
        assert greedy.top_tokens[:, 0].tolist() == greedy.tokens.tolist()
        assert not greedy.logprobs.any()
        for wrong in (replace(PARAMS, top_logprobs=-1), replace(PARAMS, mode="other")):
            with pytest.raises(BackendUserError):
                await sampler.sample([5], wrong)


async def test_a_streams_parts_are_the_samples_text(tmp_path, model):
    async with session(tmp_path, model) as opened:
        sampler = await opened.sampler()
        for seed in range(4):
            params = replace(PARAMS, seed=seed, max_tokens=40)
            (whole,) = await sampler.sample([5], params)
            parts = [part async for part in sampler.stream([5], params)]
            assert "".join(parts) == whole.text
            assert len(parts) > 3 or len(whole.tokens) < 10
            stop = whole.text[4:6] or "x"
            (cut,) = await sampler.sample([5], replace(params, stop=(stop,)))
            assert "".join([part async for part in sampler.stream([5], replace(params, stop=(stop,)))]) == cut.text


async def test_a_stream_that_is_left_frees_its_slot(tmp_path):
    async with session(tmp_path) as opened:
        sampler = limited(await opened.sampler(), rows=1)
        stream = sampler.stream([5], replace(PARAMS, max_tokens=2000))
        await anext(stream)
        await stream.aclose()
        with anyio.fail_after(20):
            await sampler.sample([5], PARAMS)


async def test_the_distribution_drawn_from_is_that_of_generate(tmp_path, llama):
    """Scores that ``generate`` processes with the same settings give our log-probabilities of our own tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model = AutoModelForCausalLM.from_pretrained(llama)
    processed = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)])
    async with session(tmp_path, llama) as opened:
        sampler = await opened.sampler()
        for sample in await sampler.sample([5, 6, 7], replace(PARAMS, temperature=0.8, top_k=20, top_p=0.9), 4):
            ids = torch.tensor([[5, 6, 7, *sample.tokens]])
            with torch.no_grad():
                scores = model(ids).logits[0, 2:-1]
            want = processed(ids, scores).log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
            np.testing.assert_allclose(sample.logprobs, want.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", [None, "Mistral", "Gemma2", "Gemma3", "Qwen3", "GPT2"])
async def test_greedy_tokens_asked_for_at_once_are_those_of_generate(tmp_path, llama, random_model, family):
    from transformers import AutoModelForCausalLM

    directory = random_model(family) if family else llama
    model = AutoModelForCausalLM.from_pretrained(directory)
    async with session(tmp_path, directory) as opened:
        sampler = await opened.sampler()
        samples = await at_once(sampler, [(p, replace(PARAMS, temperature=0.0, max_tokens=30), 1) for p in PROMPTS])
        for prompt, (sample,) in zip(PROMPTS, samples, strict=True):
            out = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=1)
            assert out[0, len(prompt) :].tolist() == sample.tokens.tolist()


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Gemma3", "Qwen3", "GPT2"])
async def test_merged_samples_of_every_family_agree_with_its_training_forward_pass(tmp_path, random_model, family):
    """Windows, caps on scores and learned positions included; the prompts are longer than the window."""
    async with session(tmp_path, random_model(family)) as opened:
        sampler = await opened.sampler()
        requests = [
            (p, replace(PARAMS, seed=i, mode=m), 2) for m in ("fast", "deterministic") for i, p in enumerate(PROMPTS)
        ]
        for (prompt, _, _), samples in zip(requests, await at_once(sampler, requests), strict=True):
            for sample in samples:
                (trained,) = await sampler.compute_logprobs([[*prompt, *sample.tokens]])
                np.testing.assert_allclose(trained[len(prompt) - 1 :], sample.logprobs, atol=1e-5)


async def test_a_model_that_keeps_more_than_keys_and_values_is_refused(tmp_path, random_model):
    async with session(tmp_path, random_model("Bloom")) as opened:
        sampler = await opened.sampler()
        with pytest.raises(CapabilityError, match="cannot be sampled here"):
            await sampler.sample([5], PARAMS)
        assert len(await sampler.compute_logprobs([[5, 6]])) == 1


async def test_the_limits_of_a_sampler_are_options_of_the_adapter(tmp_path):
    client = TorchTrainingClient(sampling_rows=3, sampling_cache_tokens=500)
    async with client.open_session(SessionSpec("tiny", None, 0, str(tmp_path))) as session:
        assert (await session.sampler())._limits == Limits(3, 500)
    assert client.public_options()["sampling_rows"] == 3
    with pytest.raises(ConfigError, match="sampling_rows"):
        TorchTrainingClient(sampling_rows=0)
