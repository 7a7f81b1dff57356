"""Gradients: independent of how a batch is split, padded and ordered; losses of any kind against autograd."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_kitchen.errors import BackendUserError, NonFiniteLoss, TrainingError
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, LossValue, SessionSpec
from crucible_kitchen_torch import logprobs as logprobs_module
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.logprobs import token_logprobs
from crucible_kitchen_torch.microbatches import plan
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.trainer import Trainer


class Square:
    """The sum of squared log-probabilities of a pair, weighted: a loss no backend has built in."""

    name = "square"
    group = 2

    def __call__(self, logprobs, loss_inputs):
        d = [2 * w["weights"].astype(np.float64) * lp for lp, w in zip(logprobs, loss_inputs, strict=True)]
        return LossValue(
            sum(float(x @ lp) / 2 for x, lp in zip(d, logprobs, strict=True)), d, {"pairs": 1, "n:mean": 3}
        )


def trainer(tmp_path, model="tiny", *, lora=None, budget=4096, dtype="float32", seed=0):
    options = TorchOptions("cpu", dtype, None, budget, deterministic=False)
    return Trainer(SessionSpec(str(model), lora, seed, str(tmp_path)), options)


def rows(count=12, seed=0, vocab=200):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 24, count)
    return [
        Datum.from_tokens(rng.integers(2, vocab, n), rng.uniform(0.1, 1, n) * (rng.random(n) < 0.6), key=f"r{i}")
        for i, n in enumerate(lengths)
    ]


def gradient(trainer, datums, loss="cross_entropy", calls=None, order=None):
    total = Accumulation()
    results = []
    for k, call in enumerate(calls or [datums]):
        turns = list(trainer.gradient(call, loss, total, None if order is None else order[k]))
        results.append(turns[-1])
    return results, torch.cat([g.flatten() for g in total.total()])


def distance(one, other):
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("loss", ["cross_entropy", Square()], ids=["cross_entropy", "pairs"])
@pytest.mark.parametrize("kind", ["tiny", "llama"])
def test_the_gradient_does_not_depend_on_micro_batches_order_or_calls(tmp_path, llama, kind, loss, dtype, tolerance):
    datums = rows()
    model = llama if kind == "llama" else "tiny"
    whole = trainer(tmp_path, model, budget=10**6, dtype=dtype)
    results, expected = gradient(whole, datums, loss)
    one_by_one = trainer(tmp_path, model, budget=1, dtype=dtype)
    split, g = gradient(one_by_one, datums, loss)
    assert distance(expected, g) <= tolerance
    assert split[0].loss == pytest.approx(results[0].loss, rel=tolerance)
    _, g = gradient(whole, datums, loss, calls=[datums[:2], datums[2:8], datums[8:]])
    assert distance(expected, g) <= tolerance
    pairs = [datums[i : i + 2] for i in range(0, 12, 2)]
    _, g = gradient(whole, [d for pair in reversed(pairs) for d in pair], loss)
    assert distance(expected, g) <= tolerance


def test_a_custom_loss_equals_autograd(tmp_path):
    t = trainer(tmp_path, dtype="float64")
    datums = rows(4)
    (result,), g = gradient(t, datums, Square())
    total = torch.zeros((), dtype=torch.float64)
    for d in datums:
        scores = t.model.head(t.model.hidden(torch.from_numpy(d.inputs["tokens"]), [len(d)])).log_softmax(-1)
        lp = scores.gather(1, torch.from_numpy(d.loss_inputs["target_tokens"])[:, None])[:, 0]
        total = total + (torch.from_numpy(d.loss_inputs["weights"]).double() * lp**2).sum()
    expected = torch.autograd.grad(total, list(t.model.module.parameters()))
    assert distance(torch.cat([e.flatten() for e in expected]), g) <= 1e-12
    assert result.loss == pytest.approx(float(total.detach()), rel=1e-12)
    assert result.metrics == {"pairs": 2, "n:mean": 3}


def test_cross_entropy_computes_only_positions_with_weight(tmp_path):
    datums = rows(3)
    (result,), _ = gradient(trainer(tmp_path), datums)
    for datum, found in zip(datums, result.logprobs, strict=True):
        assert np.array_equal(np.isnan(found), datum.loss_inputs["weights"] == 0)


def test_a_batch_without_weight_has_a_gradient_of_zero(tmp_path):
    (result,), g = gradient(trainer(tmp_path), [Datum.from_tokens([1, 2, 3], [0, 0, 0])])
    assert (result.loss, result.weight, float(g.abs().max())) == (0, 0, 0)


def test_ordered_gradients_give_equal_bits_whatever_the_arrival(tmp_path):
    datums = rows(9)
    t = trainer(tmp_path)
    calls = [datums[:3], datums[3:6], datums[6:]]
    _, expected = gradient(t, datums, calls=calls, order=[0, 1, 2])
    for arrival in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        _, g = gradient(t, datums, calls=[calls[i] for i in arrival], order=arrival)
        assert torch.equal(expected, g)


def test_an_order_is_used_once_and_not_mixed():
    sums = Accumulation()
    sums.admit(1)
    sums.add([torch.ones(1)], 1)
    with pytest.raises(BackendUserError):
        sums.admit(1)
    with pytest.raises(BackendUserError):
        sums.admit(None)
    sums.admit(3)
    sums.add([torch.ones(1)], 3)
    assert sums.total()[0].item() == 2  # what waits for an order that never came is part of the sum


def test_dropout_repeats_with_the_seed_and_leaves_forward_alone(tmp_path):
    lora = LoraSpec(4, dropout=0.5)
    grads, passes = [], []
    for seed in (0, 0, 1):
        t = trainer(tmp_path, lora=lora, seed=seed)
        gradient_ = gradient(t, rows(4))[1]
        grads.append(gradient_)
        passes.append(list(t.forward(rows(2)))[-1])
        assert distance(gradient_, gradient(t, rows(4))[1]) > 1e-3
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])
    assert np.array_equal(passes[0][0], passes[1][0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.sampled_from([1, 2, 3]), st.integers(1, 120))
def test_a_plan_holds_every_datum_once_in_whole_groups_within_the_budget(lengths, group, budget):
    lengths = lengths[: len(lengths) // group * group]
    batches = plan(lengths, group, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        starts = batch[::group]
        assert batch == [s + k for s in starts for k in range(group)]
        assert all(s % group == 0 for s in starts)
        taken = [lengths[i] for i in batch]
        assert len(batch) == group or sum(taken) <= budget


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 9))
def test_log_probabilities_in_pieces_equal_those_in_one_piece(monkeypatch, positions, piece):
    torch.manual_seed(positions)
    hidden = torch.randn(positions, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 13, dtype=torch.float64)
    targets = torch.randint(0, 13, (positions,))
    found = []
    for scores in (10**9, piece * 13):
        monkeypatch.setattr(logprobs_module, "SCORES_AT_ONCE", scores)
        out = token_logprobs(hidden, head, targets, 13)
        found.append((out, *torch.autograd.grad(out.sin().sum(), [hidden, head.weight])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def bad(loss_inputs=None, **changes):
    good = Datum.from_tokens([1, 2, 3], [1, 1, 1], key="a")
    return Datum(changes.get("inputs", good.inputs), good.loss_inputs | (loss_inputs or {}), "a")


@pytest.mark.parametrize(
    "datum",
    [
        bad(inputs={"observations": np.zeros(2)}),
        bad(inputs={"tokens": np.zeros(0, np.int64)}),
        bad(inputs={"tokens": np.array([1, 999])}),
        bad(inputs={"tokens": np.zeros(5000, np.int64)}),
        bad({"weights": np.zeros(3, np.float32)}),
        bad({"target_tokens": np.array([-1, 2])}),
    ],
)
def test_a_datum_the_model_cannot_take_is_refused_by_its_key(tmp_path, datum):
    with pytest.raises(BackendUserError, match="'a'"):
        gradient(trainer(tmp_path), [datum])


def test_a_loss_that_raises_or_returns_the_wrong_shape_is_named(tmp_path):
    class Broken(Square):
        name = "broken"

        def __call__(self, logprobs, loss_inputs):
            raise RuntimeError("secret row")

    class Short(Square):
        name = "short"

        def __call__(self, logprobs, loss_inputs):
            return LossValue(0.0, [lp[1:] for lp in logprobs])

    t = trainer(tmp_path)
    for loss in (Broken(), Short()):
        with pytest.raises(TrainingError, match=loss.name) as error:
            gradient(t, rows(2), loss)
        assert "secret" not in str(error.value)
    with pytest.raises(BackendUserError):
        gradient(t, rows(3), Square())


def test_a_gradient_that_overflows_leaves_the_weights_as_they_were(tmp_path):
    t = trainer(tmp_path)
    before = [p.detach().clone() for p in t.model.module.parameters()]
    total = Accumulation()
    list(t.gradient([Datum.from_tokens([1, 2, 3], [1, 1e30, 1e30], key="huge")], "cross_entropy", total, None))
    with pytest.raises(NonFiniteLoss, match="huge"):
        t.apply(total, AdamParams(1e-3), 1e30)
    assert t.position == 0
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.module.parameters(), strict=True))


def test_steps_equal_those_of_torch_with_settings_that_change(tmp_path):
    t = trainer(tmp_path, dtype="float64")
    mirror = trainer(tmp_path, dtype="float64")
    weights = list(mirror.model.module.parameters())
    reference = torch.optim.AdamW(weights, fused=False, foreach=False)
    for k, params in enumerate(
        [AdamParams(1e-3, grad_clip_norm=0.1), AdamParams(5e-3, 0.8, 0.9, 1e-6, 0.1), AdamParams(1e-4)]
    ):
        total = Accumulation()
        list(t.gradient(rows(4, k), "cross_entropy", total, None))
        result = t.apply(total, params, 0.25)
        other = Accumulation()
        list(mirror.gradient(rows(4, k), "cross_entropy", other, None))
        for p, g in zip(weights, other.total(), strict=True):
            p.grad = g * 0.25
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        for p in weights if params.grad_clip_norm else []:
            p.grad *= min(1.0, params.grad_clip_norm / float(norm))
        group = reference.param_groups[0]
        group["lr"], group["betas"] = params.learning_rate, (params.beta1, params.beta2)
        group["eps"], group["weight_decay"] = params.eps, params.weight_decay
        reference.step()
        reference.zero_grad()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-12)
        assert result.step == k + 1
    for one, other in zip(t.model.module.parameters(), weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
