"""Datums of a group that begin alike: the beginning is computed once, and every gradient stays what it was."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_kitchen.learner import DPO
from crucible_kitchen.types import Datum, LoraSpec, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient, microbatches
from crucible_kitchen_torch.accumulate import Accumulation, Pass
from crucible_kitchen_torch.microbatches import shared_beginnings
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.trainer import Trainer

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
LLAMA_TOLERANCE = 1e-6  # in float64 too: its norms are computed in float32 by transformers
KINDS = {"tiny": None, "tiny_lora": LoraSpec(4), "llama": None, "llama_lora": LoraSpec(4)}


def pair(seed, prompt, chosen, rejected):
    """A pair of answers to one prompt, with reference log-probabilities."""
    rng = np.random.default_rng(seed)
    start = rng.integers(2, 200, prompt)
    found = []
    for number, length in enumerate((chosen, rejected)):
        answer = [3 + number, *rng.integers(2, 200, length - 1)]  # they part at once
        plain = Datum.from_tokens([*start, *answer], [0.0] * prompt + [1.0] * length, key=f"{seed}.{number}")
        reference = rng.normal(-5, 1, len(plain)).astype(np.float32)
        found.append(Datum(plain.inputs, {**plain.loss_inputs, "reference_logprobs": reference}, plain.key))
    return found


def trainer(tmp_path, llama, kind, dtype, budget=4096):
    model = str(llama) if kind.startswith("llama") else "tiny"
    options = TorchOptions("cpu", dtype, None, budget, deterministic=False, verify_invariance="off")
    t = Trainer(SessionSpec(model, KINDS[kind], 0, str(tmp_path)), options)
    if KINDS[kind] is not None:  # a new adapter has half of its gradients at zero
        torch.manual_seed(1)
        with torch.no_grad():
            for p in t.weights.trained.values():
                p.add_(0.02 * torch.randn_like(p))
    return t


def gradient(t, datums):
    total = Accumulation()
    (*_, result) = t.gradient(datums, DPO(beta=0.5), total, None)
    return result, total.total()


def apart(t, datums, monkeypatch):
    """The same without sharing."""
    with monkeypatch.context() as patch:
        patch.setattr(microbatches, "WORTH_SHARING", 10**9)
        return gradient(t, datums)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_whole_rows(tmp_path, llama, monkeypatch, kind, dtype):
    t = trainer(tmp_path, llama, kind, dtype)
    tolerance = LLAMA_TOLERANCE if kind.startswith("llama") else TOLERANCE[dtype]
    datums = [*pair(1, 40, 7, 12), *pair(2, 18, 1, 9), *pair(3, 3, 5, 4), *pair(4, 40, 7, 12)]
    assert shared_beginnings(datums, 2) == {1: 39 + 1, 3: 17 + 1, 7: 39 + 1}
    shared, one = gradient(t, datums)
    whole, other = apart(t, datums, monkeypatch)
    assert shared.loss == pytest.approx(whole.loss, rel=tolerance)
    assert shared.tokens == whole.tokens == sum(len(d) for d in datums)
    flat = [torch.cat([g.flatten() for g in grads]) for grads in (one, other)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) <= tolerance
    for a, b in zip(shared.logprobs, whole.logprobs, strict=True):
        assert np.max(np.abs(a - b)) < 1e-4


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4))
def test_any_pairs_under_any_budget(tmp_path, llama, monkeypatch, shapes):
    datums = [d for seed, shape in enumerate(shapes) for d in pair(seed, *shape)]
    for budget in (1, 4096):
        t = trainer(tmp_path, llama, "tiny", "float64", budget)
        _, one = gradient(t, datums)
        _, other = apart(t, datums, monkeypatch)
        flat = [torch.cat([g.flatten() for g in grads]) for grads in (one, other)]
        assert float((flat[0] - flat[1]).norm() / flat[1].norm()) <= 1e-12


def test_what_is_shared_is_computed_once(tmp_path, llama):
    t = trainer(tmp_path, llama, "tiny", "float32")
    seen = []
    hidden = t.model.hidden

    class Counting:
        def __getattr__(self, name):
            return getattr(t.model, name)

        def hidden(self, tokens, lengths, joins=None):
            seen.append(len(tokens))
            return hidden(tokens, lengths, joins)

    datums = pair(1, 40, 7, 12)
    work = Pass(Counting(), datums, DPO(), 4096)
    list(work.run())
    assert seen == [sum(len(d) for d in datums) - 40]


def test_equal_rows_and_rows_inside_others_keep_a_position_of_their_own():
    tokens = np.arange(30)
    rows = [
        Datum({"tokens": t}, {}) for t in (tokens, tokens.copy(), tokens[:20], tokens[:20].copy(), tokens[:20], tokens)
    ]
    assert shared_beginnings(rows, 2) == {1: 29, 3: 19, 5: 20}
    assert shared_beginnings(rows, 3) == {1: 29, 2: 19, 4: 19, 5: 20}
    assert shared_beginnings(rows, 1) == {}


@pytest.mark.anyio
async def test_a_session_says_whether_its_model_shares(tmp_path, llama):
    client = TorchTrainingClient(device="cpu", threads=1)
    for model in ("tiny", str(llama)):
        async with client.open_session(SessionSpec(model, None, 0, str(tmp_path))) as session:
            assert session.capabilities.shared_prefix
