"""The contract of a ``Sampler``, whoever opened it: a training session or a sampling client.

Each check takes a sampler and what is allowed to it. Knows no adapter. Read next:
``crucible_kitchen.testing.contracts.sampling_client``.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import anyio
import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError
from crucible_kitchen.ports import Sampler
from crucible_kitchen.testing.contracts.base import close, refuses, skip
from crucible_kitchen.types import Sampled, SamplingParams

__all__ = ["SAMPLER_CHECKS", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """An open sampler under test.

    Attributes:
        sampler: the sampler.
        tolerance: how far log-probabilities may differ that are computed in two ways.
        context_length: longest sequence, tokens; 0 if it is not known.
    """

    sampler: Sampler
    tolerance: float = 1e-3
    context_length: int = 0

    def prompt(self, text: str = "12+34=") -> list[int]:
        """Return a prompt."""
        tokenizer = self.sampler.tokenizer
        return [*tokenizer.prefix_ids, *tokenizer.encode(text)]


_PARAMS = SamplingParams(max_tokens=12, temperature=1.0, seed=11)


def _equal(one: Sequence[Sampled], other: Sequence[Sampled]) -> bool:
    return [(s.tokens.tolist(), s.text, s.stop_reason) for s in one] == [
        (s.tokens.tolist(), s.text, s.stop_reason) for s in other
    ]


async def the_same_seed_gives_the_same_samples(case: Sampling) -> None:
    """Sample ``i`` draws from (seed, i): the first of three is the only one of one; others differ."""
    one, again = [await case.sampler.sample(case.prompt(), _PARAMS, 3) for _ in range(2)]
    assert _equal(one, again), "the same seed gave other samples"
    assert _equal(await case.sampler.sample(case.prompt(), _PARAMS, 1), one[:1]), "n changes the first sample"
    other = await case.sampler.sample(case.prompt(), replace(_PARAMS, seed=12), 3)
    assert not _equal(one, other), "seed or index do not matter"
    assert not _equal(one[:1], one[1:2]), "seed or index do not matter"


async def concurrent_samples_equal_sequential_ones(case: Sampling) -> None:
    """Whatever else runs."""
    requests = [(case.prompt(f"{i}+{i}="), replace(_PARAMS, seed=i)) for i in range(5)]
    alone = [await case.sampler.sample(prompt, params, 2) for prompt, params in requests]
    together: dict[int, list[Sampled]] = {}

    async def sample(number: int) -> None:
        together[number] = await case.sampler.sample(*requests[number], 2)

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(sample, number)
    for number, samples in enumerate(alone):
        assert _equal(samples, together[number]), f"request {number} got other samples in company"


async def a_sample_states_its_tokens(case: Sampling) -> None:
    """Shapes, types, text, reason and version fit together."""
    for sample in await case.sampler.sample(case.prompt(), _PARAMS, 3):
        assert sample.tokens.dtype == np.int64, f"tokens are {sample.tokens.dtype}"
        assert sample.tokens.ndim == 1, f"tokens are {sample.tokens.dtype}"
        assert sample.logprobs.shape == sample.tokens.shape, "not one log-probability per token"
        assert 1 <= len(sample.tokens) <= _PARAMS.max_tokens, f"{len(sample.tokens)} tokens of 12"
        ended = int(sample.tokens[-1]) == case.sampler.tokenizer.eos_id
        assert ended == (sample.stop_reason == "stop"), f"{sample.stop_reason}, end token {ended}"
        assert sample.text == case.sampler.tokenizer.decode(sample.tokens.tolist()), "the text is not the tokens'"
        assert sample.version == case.sampler.version, "the version is not the sampler's"


async def sampled_logprobs_are_the_models(case: Sampling) -> None:
    """At temperature 1 they equal ``compute_logprobs``."""
    prompt = case.prompt()
    for sample in await case.sampler.sample(prompt, _PARAMS, 2):
        computed = (await case.sampler.compute_logprobs([prompt + sample.tokens.tolist()]))[0]
        assert computed.shape == (len(prompt) + len(sample.tokens) - 1,), f"shape {computed.shape}"
        close([computed[len(prompt) - 1 :]], [sample.logprobs], case.tolerance, "log-probabilities of a sample")


async def logprobs_do_not_depend_on_company(case: Sampling) -> None:
    """Sequences of different lengths in one call give what they give alone."""
    sequences = [case.prompt("1+1=2"), case.prompt("123+456=579"), case.prompt("7")]
    together = await case.sampler.compute_logprobs(sequences)
    for number, sequence in enumerate(sequences):
        alone = await case.sampler.compute_logprobs([sequence])
        assert bool(np.all(alone[0] <= 1e-6)), "a log-probability is positive"
        close(alone, [together[number]], case.tolerance, f"sequence {number} alone and in company")


async def temperature_zero_takes_the_likeliest_token(case: Sampling) -> None:
    """Whatever the seed; ``top_k=1`` and a tiny ``top_p`` do the same, with probability 1 (or unknown: NaN)."""
    greedy = await case.sampler.sample(case.prompt(), replace(_PARAMS, temperature=0.0, seed=1))
    for params in (
        replace(_PARAMS, temperature=0.0, seed=2),
        replace(_PARAMS, top_k=1),
        replace(_PARAMS, top_p=1e-6),
    ):
        sample = (await case.sampler.sample(case.prompt(), params))[0]
        assert sample.tokens.tolist() == greedy[0].tokens.tolist(), f"other tokens with {params}"
        if params.temperature:
            wrong = sample.logprobs[~np.isnan(sample.logprobs)]
            assert np.allclose(wrong, 0.0, atol=1e-5), "log-probabilities are not of the processed distribution"


async def a_stop_text_ends_a_sample(case: Sampling) -> None:
    """It is not part of the text; the reason is ``stop``."""
    for seed in range(12):
        params = replace(_PARAMS, seed=seed)
        text = (await case.sampler.sample(case.prompt(), params))[0].text
        stop = next((c for c in text[1:] if " " < c < "\x7f"), "")
        if stop:
            stopped = (await case.sampler.sample(case.prompt(), replace(params, stop=(stop,))))[0]
            assert stopped.text == text[: text.index(stop)], "the text does not end before the stop text"
            assert stopped.stop_reason == "stop", f"the reason is {stopped.stop_reason}"
            return
    skip("the model writes nothing printable to stop at")


async def more_log_probabilities_are_given_or_refused(case: Sampling) -> None:
    """Of the model's own distribution: of the tokens, of the likeliest tokens, and of the prompt."""
    prompt = case.prompt()
    params = replace(_PARAMS, temperature=0.7, top_k=5, raw_logprobs=True, top_logprobs=3, prompt_logprobs=True)
    try:
        sample = (await case.sampler.sample(prompt, params))[0]
    except CapabilityError:
        return
    (scored,) = await case.sampler.compute_logprobs([[*prompt, *sample.tokens.tolist()]])
    assert sample.raw_logprobs is not None, "raw_logprobs are missing"
    assert sample.prompt_logprobs is not None, "prompt_logprobs are missing"
    assert sample.top_tokens is not None, "top_tokens are missing"
    assert sample.top_logprobs is not None, "top_logprobs are missing"
    close([sample.raw_logprobs], [scored[len(prompt) - 1 :]], case.tolerance, "raw log-probabilities and the model's")
    close([sample.prompt_logprobs], [scored[: len(prompt) - 1]], case.tolerance, "those of the prompt and the model's")
    assert sample.top_tokens.shape == sample.top_logprobs.shape == (len(sample.tokens), 3), "a shape is not [T, k]"
    assert bool(np.all(np.diff(sample.top_logprobs, axis=1) <= 0)), "the likeliest token does not stand first"
    best = sample.top_logprobs[:, 0]
    assert bool(np.all(sample.raw_logprobs <= best + case.tolerance)), "a drawn token is likelier than the likeliest"


async def deterministic_samples_have_the_same_bits_in_company(case: Sampling) -> None:
    """Or the mode is refused."""
    params = replace(_PARAMS, mode="deterministic")
    try:
        alone = await case.sampler.sample(case.prompt(), params, 2)
    except CapabilityError:
        return
    found: list[list[Sampled]] = []

    async def ask() -> None:
        found.append(await case.sampler.sample(case.prompt(), params, 2))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        for seed in range(3):
            group.start_soon(case.sampler.sample, case.prompt(), replace(params, seed=seed), 2)
            group.start_soon(case.sampler.sample, case.prompt(), replace(_PARAMS, seed=seed), 2)
    for a, b in zip(alone, found[0], strict=True):
        assert (a.tokens.tolist(), a.logprobs.tobytes()) == (b.tokens.tolist(), b.logprobs.tobytes()), "other bits"


async def rescored_log_probabilities_are_the_models(case: Sampling) -> None:
    """Exactly what ``compute_logprobs`` gives for the request's samples; a processed distribution is refused."""
    prompt, params = case.prompt(), replace(_PARAMS, temperature=1.0, rescore=True)
    try:
        samples = await case.sampler.sample(prompt, params, 2)
    except CapabilityError:
        return
    scored = await case.sampler.compute_logprobs([[*prompt, *s.tokens.tolist()] for s in samples])
    for sample, logprobs in zip(samples, scored, strict=True):
        assert sample.logprobs.tobytes() == logprobs[len(prompt) - 1 :].tobytes(), "not the model's to the last bit"
    with refuses(BackendUserError, what="rescore of a processed distribution"):
        await case.sampler.sample(prompt, replace(params, temperature=0.5))


async def impossible_requests_are_refused(case: Sampling) -> None:
    """An empty prompt, no tokens to draw, a prompt beyond the context."""
    with refuses(BackendUserError, what="an empty prompt"):
        await case.sampler.sample([], _PARAMS)
    with refuses(BackendUserError, what="max_tokens=0"):
        await case.sampler.sample(case.prompt(), replace(_PARAMS, max_tokens=0))
    if case.context_length:
        with refuses(BackendUserError, what="a prompt beyond the context"):
            await case.sampler.sample([case.prompt()[-1]] * (case.context_length + 1), _PARAMS)


async def a_cancelled_sample_leaves_the_sampler_usable(case: Sampling) -> None:
    """The next request is answered as if nothing had been."""
    before = await case.sampler.sample(case.prompt(), _PARAMS, 2)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await case.sampler.sample(case.prompt(), _PARAMS, 2)
    assert scope.cancelled_caught, "the request could not be cancelled"
    assert _equal(await case.sampler.sample(case.prompt(), _PARAMS, 2), before), "other samples after a cancelled one"


SAMPLER_CHECKS: tuple[Callable[[Sampling], Awaitable[None]], ...] = (
    the_same_seed_gives_the_same_samples,
    concurrent_samples_equal_sequential_ones,
    a_sample_states_its_tokens,
    sampled_logprobs_are_the_models,
    logprobs_do_not_depend_on_company,
    temperature_zero_takes_the_likeliest_token,
    a_stop_text_ends_a_sample,
    more_log_probabilities_are_given_or_refused,
    deterministic_samples_have_the_same_bits_in_company,
    rescored_log_probabilities_are_the_models,
    impossible_requests_are_refused,
    a_cancelled_sample_leaves_the_sampler_usable,
)
