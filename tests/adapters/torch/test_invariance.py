"""The gate before the first step: silent where a gradient is sound, an error where it depends on the split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_kitchen.errors import ConfigError, TrainingError
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, LossValue, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.invariance import compare, other_split
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.trainer import Trainer

DATUMS = [Datum.from_tokens(list(range(5, 5 + n)), [1] * n) for n in (7, 30, 3, 9, 12)]


def trainer(tmp_path, verify="auto", *, dtype="float32", lora=None):
    options = TorchOptions("cpu", dtype, None, 4096, deterministic=False, verify_invariance=verify)
    return Trainer(SessionSpec("tiny", lora, 0, str(tmp_path)), options)


def step(trainer, loss="cross_entropy", datums=DATUMS):
    total = Accumulation()
    list(trainer.gradient(datums, loss, total, None))
    return trainer.apply(total, AdamParams(1e-3), 1.0).metrics


class Moody:
    """A loss that is not a pure function: each call weighs more than the one before."""

    name = "moody"
    group = 1

    def __init__(self):
        self.calls = 0

    def __call__(self, logprobs, loss_inputs):
        self.calls += 1
        return LossValue(float(self.calls), [np.full(len(lp), -float(self.calls)) for lp in logprobs])


@pytest.mark.parametrize("lora", [None, LoraSpec(4, dropout=0.5)], ids=["all", "dropout"])
def test_the_first_step_says_what_the_gate_cost_and_found_and_no_later_one(tmp_path, lora):
    t = trainer(tmp_path, lora=lora)
    first, second = step(t), step(t)
    assert first["invariance_check_s"] > 0
    assert first["invariance_difference"] <= 1e-5
    assert "invariance_check_s" not in second


def test_the_gate_changes_no_bit_of_training(tmp_path):
    weights = []
    for verify in ("on", "off"):
        t = trainer(tmp_path, verify, lora=LoraSpec(4, dropout=0.5))
        step(t), step(t)
        weights.append([p.detach().clone() for p in t.model.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_loss_with_a_memory_stops_the_run_before_its_first_step(tmp_path):
    t = trainer(tmp_path)
    with pytest.raises(TrainingError, match="depends on how the batch is split") as error:
        step(t, Moody())
    assert "pure" in error.value.hint
    assert t.position == 0
    assert step(t)["invariance_difference"] <= 1e-5  # the session stays usable
    assert "invariance_check_s" not in step(trainer(tmp_path, "off"), Moody())


def test_auto_leaves_out_what_it_cannot_judge_cheaply(tmp_path):
    assert "invariance_check_s" not in step(trainer(tmp_path, dtype="float64"))
    assert "invariance_check_s" in step(trainer(tmp_path, "on", dtype="float64"))
    t = trainer(tmp_path)
    assert "invariance_check_s" not in step(t, datums=DATUMS[:1])


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="verify_invariance"):
        TorchTrainingClient(verify_invariance="maybe")


def gradients(trainer, datums, budget):
    trainer.budget = budget
    total = Accumulation()
    list(trainer.gradient(datums, "cross_entropy", total, None))
    return total.total()


@pytest.fixture(params=["tiny", "llama", "by_length"])
def exact(request, llama, monkeypatch):
    """A model's name; by_length: one whose rows of different lengths cannot be computed in one pass."""
    if request.param == "by_length":
        monkeypatch.setattr("crucible_kitchen_torch.huggingface.use_unpadded", lambda _: False)
    return "tiny" if request.param == "tiny" else str(llama)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_no_tensor_of_a_gradient_depends_on_lengths_budget_or_order(tmp_path, exact, dtype, tolerance):
    options = TorchOptions("cpu", dtype, None, 4096, deterministic=False, verify_invariance="off")
    t = Trainer(SessionSpec(exact, None, 0, str(tmp_path)), options)

    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.integers(4, 40), min_size=2, max_size=8), st.integers(1, 200), st.randoms(use_true_random=False))
    def law(lengths, budget, random):
        datums = of_lengths(lengths)
        expected = gradients(t, datums, 10**6)
        random.shuffle(datums)
        found = gradients(t, datums, budget)
        assert max(float((a - b).norm() / a.norm()) for a, b in zip(expected, found, strict=True)) <= tolerance

    law()


def of_lengths(lengths):
    rng = np.random.default_rng(sum(lengths))
    return [Datum.from_tokens(rng.integers(2, 200, n + 1), [1.0] * (n + 1)) for n in lengths]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_gradient_is_that_of_one_batch_padded_on_either_side(tmp_path, llama, side):
    """Of a plain model of transformers with an attention mask; padding reaches no tensor of the gradient."""
    from transformers import AutoModelForCausalLM

    datums = of_lengths([5, 31, 12, 31, 20])
    options = TorchOptions("cpu", "float64", None, 48, deterministic=False, verify_invariance="off")
    found = gradients(Trainer(SessionSpec(str(llama), None, 0, str(tmp_path)), options), datums, 48)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    width = max(map(len, datums))
    tokens, targets, mask = (torch.zeros(len(datums), width, dtype=torch.int64) for _ in range(3))
    for row, d in enumerate(datums):
        at = slice(width - len(d), width) if side == "left" else slice(0, len(d))
        tokens[row, at] = torch.from_numpy(d.inputs["tokens"])
        targets[row, at] = torch.from_numpy(d.loss_inputs["target_tokens"])
        mask[row, at] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    scores = model(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False).logits.log_softmax(-1)
    loss = -(scores.gather(2, targets[..., None])[..., 0] * mask).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert max(float((a - b).norm() / a.norm()) for a, b in zip(expected, found, strict=True)) <= 1e-12


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 3))
def test_another_split_holds_the_same_datums_in_whole_groups_and_differs(sizes, group):
    ids = iter(range(sum(sizes) * group))
    batches = [[next(ids) for _ in range(n * group)] for n in sizes]
    if sum(sizes) < 2:
        return
    other = other_split(batches, group)
    assert sorted(i for b in other for i in b) == list(range(sum(sizes) * group))
    assert all(len(b) % group == 0 and b for b in other)
    assert other != batches


def test_a_gradient_that_is_zero_but_for_rounding_is_not_held_to_its_own_norm():
    grads, others = [torch.ones(4), torch.full((2,), 1e-9)], [torch.ones(4), torch.full((2,), -1e-9)]
    assert compare(["w", "k.bias"], grads, others, 1e-4) <= 1e-6
    with pytest.raises(TrainingError, match="w differs"):
        compare(["w", "k.bias"], grads, [2 * torch.ones(4), others[1]], 1e-4)
    with pytest.raises(TrainingError):
        compare(["w"], [torch.ones(2)], [torch.tensor([1.0, float("nan")])], 1e-4)
