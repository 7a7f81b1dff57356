"""Numbers of computation: half precision for products only, chosen by measuring, the same code on every device."""

import logging

import numpy as np
import pytest
import torch

from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SamplingParams, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch import placement as placement_module
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.placement import placement
from crucible_kitchen_torch.states import write_state
from crucible_kitchen_torch.trainer import Trainer

DATUMS = [Datum.from_tokens(list(range(5, 5 + n)), [1] * n) for n in (7, 30, 3, 9)]


def save(trainer, name):
    return write_state(trainer.directory, name, *trainer.copy_state())


def opened(tmp_path, model, dtype, lora=None):
    options = TorchOptions("cpu", dtype, None, 32, deterministic=False, verify_invariance="on")
    return Trainer(SessionSpec(str(model), lora, 0, str(tmp_path)), options)


def step(trainer):
    total = Accumulation()
    result = list(trainer.gradient(DATUMS, "cross_entropy", total, None))[-1]
    trainer.apply(total, AdamParams(1e-3), 0.02)
    return result.loss


@pytest.mark.parametrize("lora", [None, LoraSpec(4)], ids=["all", "lora"])
@pytest.mark.parametrize("kind", ["tiny", "llama"])
def test_half_precision_learns_as_float32_does_and_keeps_its_weights_whole(tmp_path, llama, kind, lora):
    model = llama if kind == "llama" else kind
    whole, half = (opened(tmp_path, model, dtype, lora) for dtype in ("float32", "bfloat16"))
    for _ in range(3):
        expected, found = step(whole), step(half)
        assert found == pytest.approx(expected, rel=1e-2)
        assert found != expected  # it was not float32 that computed
    assert {p.dtype for p in half.model.module.parameters()} == {torch.float32}
    assert {t.dtype for t in half._adam.tensors().values()} == {torch.float32}
    assert (whole.info.dtype, half.info.dtype) == ("float32", "bfloat16")
    out = list(half.forward(DATUMS))[-1]
    assert all(x.dtype == np.float32 for x in out)
    state = save(half, "one")
    after = step(half)
    half.load(state)
    assert step(half) == after


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tiny", "llama"])
async def test_half_precision_samples_what_its_own_forward_pass_scores(tmp_path, llama, kind):
    model = str(llama) if kind == "llama" else kind
    async with TorchTrainingClient(dtype="bfloat16").open_session(
        SessionSpec(model, None, 0, str(tmp_path))
    ) as session:
        sampler = await session.sampler()
        (found,) = await sampler.sample([5, 6, 7, 8], SamplingParams(max_tokens=8, temperature=1.0, seed=1))
        tokens = [5, 6, 7, 8, *found.tokens]
        (scored,) = await sampler.compute_logprobs([tokens])
        np.testing.assert_allclose(found.logprobs, scored[3:], rtol=0, atol=0.1)


@pytest.mark.parametrize(("half", "expected"), [(1.0, torch.float32), (0.1, torch.bfloat16)])
def test_auto_takes_the_faster_numbers_and_says_so(monkeypatch, caplog, half, expected):
    placement_module._fastest.cache_clear()
    monkeypatch.setattr(placement_module, "_seconds", lambda dtype: 1.0 if dtype == torch.float32 else half)
    options = TorchOptions("cpu", "auto", None, 32, deterministic=False)
    with caplog.at_level(logging.INFO):
        assert placement(options).dtype == expected
    assert str(expected).removeprefix("torch.") in caplog.text
    placement_module._fastest.cache_clear()


def test_auto_measures_within_milliseconds_and_only_once(tmp_path):
    placement_module._fastest.cache_clear()
    trainer = opened(tmp_path, "tiny", "auto")
    assert trainer.info.dtype in ("float32", "bfloat16")
    opened(tmp_path, "tiny", "auto")
    assert placement_module._fastest.cache_info().misses == 1
