"""Preference losses: TRL's own numbers, torch's gradients of the formulas, known values, far margins, refusals."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from crucible_kitchen.learner import (
    DPO,
    IPO,
    KTO,
    ORPO,
    APOZero,
    BradleyTerry,
    Hinge,
    RobustDPO,
    SimPO,
    kto_reference_point,
)
from crucible_kitchen.types import Loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text(encoding="utf-8"))
PAIRS = GOLDEN["preference"]
TIGHT = {"rtol": 0, "atol": 1e-10}
LOSSES = [DPO(), DPO(label_smoothing=0.1), RobustDPO(), IPO(), Hinge(), APOZero(), SimPO(), ORPO(), ORPO(nll=0.0)]


def draw(seed, scale=1.0):
    """A pair with prompts, of unlike lengths; what is not trained is nonsense."""
    rng = np.random.default_rng(seed)
    logprobs, inputs = [], []
    for length in rng.integers(3, 20, size=2):
        weights = (np.arange(length) >= rng.integers(0, length - 1)).astype(np.float32)
        x = -scale * rng.exponential(1.0, length)
        reference = np.where(weights == 0, np.nan, x + scale * rng.normal(size=length))
        logprobs.append(x)
        inputs.append({"weights": weights, "reference_logprobs": reference})
    return logprobs, inputs


def scores(x, inputs):
    """Sums of log-ratios, means of log-ratios, means of log-probabilities, each of chosen and rejected."""
    found = []
    for now, i in zip(x, inputs, strict=True):
        places = torch.from_numpy(np.flatnonzero(i["weights"]))
        ratio = now[places] - torch.from_numpy(i["reference_logprobs"])[places]
        found.append((ratio.sum(), ratio.mean(), now[places].mean()))
    return zip(*found, strict=True)


def formula(loss, x, inputs):
    (c, r), (mc, mr), (ac, ar) = scores(x, inputs)
    b, h = loss.beta, loss.beta * (c - r)
    e = getattr(loss, "label_smoothing", 0.0)
    if loss.name == "sigmoid":
        return -(1 - e) * logsigmoid(h) - e * logsigmoid(-h)
    if loss.name == "robust":
        return (-(1 - e) * logsigmoid(h) + e * logsigmoid(-h)) / (1 - 2 * e)
    if loss.name == "ipo":
        return (mc - mr - 1 / (2 * b)) ** 2
    if loss.name == "hinge":
        return torch.relu(1 - h)
    if loss.name == "apo_zero":
        return 1 - torch.sigmoid(b * c) + torch.sigmoid(b * r)
    if loss.name == "simpo":
        return -logsigmoid(b * (ac - ar) - loss.gamma)
    odds = (ac - ar) - (torch.log1p(-torch.exp(ac)) - torch.log1p(-torch.exp(ar)))
    return -loss.nll * ac - b * logsigmoid(odds)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_the_loss_and_its_derivative_are_torch_s(loss, seed):
    logprobs, inputs = draw(seed)
    x = [torch.from_numpy(p).requires_grad_() for p in logprobs]
    total = formula(loss, x, inputs)
    expected = torch.autograd.grad(total, x)
    found = loss(logprobs, inputs)
    assert found.total == pytest.approx(total.item(), abs=1e-10, rel=1e-12)
    for ours, theirs in zip(found.d_logprobs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), **TIGHT)


OURS = {
    "sigmoid": DPO,
    "robust": RobustDPO,
    "ipo": IPO,
    "hinge": Hinge,
    "apo_zero": APOZero,
    "simpo": SimPO,
    "orpo": lambda **options: ORPO(nll=0.0, **options),
}


@pytest.mark.parametrize("case", PAIRS["cases"], ids=lambda case: case["type"])
def test_sums_over_pairs_are_trl_s(case):
    logprobs, reference, mask = (np.array(PAIRS[name], float) for name in ("logprobs", "reference", "mask"))
    loss, n, total = OURS[case["type"]](beta=PAIRS["beta"]), len(mask) // 2, 0.0
    gradient, metrics = np.zeros_like(logprobs), dict.fromkeys(("accuracy", "margin"), 0.0)
    for i in range(n):
        pair = [i, i + n]
        inputs = [{"weights": mask[j], "reference_logprobs": reference[j]} for j in pair]
        value = loss(logprobs[pair], inputs)
        total += value.total
        gradient[pair] = value.d_logprobs
        metrics = {name: metrics[name] + value.metrics[name] for name in metrics}
    assert total == pytest.approx(case["loss"], abs=1e-10)
    np.testing.assert_allclose(gradient, case["gradient"], **TIGHT)
    if "margins" in case:
        assert metrics["margin"] / n == pytest.approx(case["margins"], abs=1e-12)
        assert metrics["accuracy"] / n == pytest.approx(case["accuracies"], abs=1e-7)


def test_kto_is_trl_s():
    case = GOLDEN["kto"]
    logprobs, reference, mask = (np.array(case[name], float) for name in ("logprobs", "reference", "mask"))
    z = kto_reference_point(case["mismatched"])
    assert z == pytest.approx(case["z"], abs=1e-12)
    loss = KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    loss = dataclasses.replace(loss, reference_point=z)
    total, gradient = 0.0, []
    for now, ref, m, label in zip(logprobs, reference, mask, case["labels"], strict=True):
        inputs = {"weights": m, "reference_logprobs": ref, "desirable": np.full(len(m), label)}
        value = loss([now], [inputs])
        total += value.total
        gradient.append(value.d_logprobs[0])
    assert total == pytest.approx(case["loss"], abs=1e-10)
    np.testing.assert_allclose(gradient, case["gradient"], **TIGHT)


def equal(loss):
    """The loss where policy and reference are equal."""
    now = np.array([-1.0, -2, -3])
    inputs = {"weights": np.array([0, 1, 1]), "reference_logprobs": now, "desirable": np.ones(3)}
    return loss([now] * loss.group, [inputs] * loss.group)


def test_at_the_first_step_dpo_is_ln_2_with_accuracy_0():
    for loss in (DPO(), DPO(beta=5.0, label_smoothing=0.2), RobustDPO()):
        found = equal(loss)
        assert found.total == pytest.approx(math.log(2), abs=1e-15)
        assert found.metrics["accuracy"] == 0
        assert found.metrics["margin"] == 0
    assert equal(DPO()).total == math.log(2)


def test_other_losses_have_their_known_first_value():
    assert equal(IPO(beta=0.1)).total == pytest.approx(25)
    assert equal(Hinge()).total == 1
    assert equal(APOZero()).total == pytest.approx(1)
    assert equal(SimPO(gamma=0.0)).total == pytest.approx(math.log(2))
    assert equal(ORPO(nll=0.0, beta=1.0)).total == pytest.approx(math.log(2))
    assert equal(KTO()).total == pytest.approx(0.5)


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("loss", [*LOSSES, KTO(), KTO(reference_point=3.0)], ids=repr)
def test_margins_of_ten_thousand_nats_stay_finite(loss, margin):
    base = -2e4 * np.ones(2)
    first = {"weights": np.ones(2), "reference_logprobs": base, "desirable": np.ones(2)}
    logprobs = [base + margin, base][: loss.group]
    loss = dataclasses.replace(loss, beta=1.0)
    found = loss(logprobs, [first, first | {"desirable": np.zeros(2)}][: loss.group])
    assert np.isfinite([found.total, *np.concatenate(found.d_logprobs), *found.metrics.values()]).all()


def test_a_wrong_pair_far_away_is_pulled_with_the_whole_beta():
    base, w = np.zeros(2), np.ones(2)
    inputs = [{"weights": w, "reference_logprobs": base}] * 2
    found = DPO(beta=0.3)([base - 1e4, base + 1e4], inputs)
    np.testing.assert_allclose(found.d_logprobs, [[-0.3, -0.3], [0.3, 0.3]])
    assert found.total == pytest.approx(0.3 * 4e4)


def test_a_certain_answer_has_finite_odds():
    w = {"weights": np.ones(2)}
    for logprobs in ([np.zeros(2), -np.ones(2)], [-np.ones(2), np.zeros(2)]):
        found = ORPO()(logprobs, [w, w])
        assert np.isfinite([found.total, *np.concatenate(found.d_logprobs)]).all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_prompts_and_padding_take_no_part(loss):
    logprobs, inputs = draw(1)
    before = loss(logprobs, inputs)
    wide = [np.concatenate([[-7.0, -8], x, [-9.0]]) for x in logprobs]
    more = [{k: np.concatenate([[0, 0], x, [0]]) for k, x in i.items()} for i in inputs]
    after = loss(wide, more)
    assert after.total == before.total
    for d, whole in zip(before.d_logprobs, after.d_logprobs, strict=True):
        np.testing.assert_array_equal(whole, [0, 0, *d, 0])


def test_bad_pairs_are_refused():
    logprobs, inputs = draw(0)
    with pytest.raises(ValueError, match="answer without tokens"):
        DPO()(logprobs, [inputs[0], inputs[1] | {"weights": 0 * inputs[1]["weights"]}])
    with pytest.raises(ValueError, match="'sigmoid' needs the input 'reference_logprobs'"):
        DPO()(logprobs, [{"weights": i["weights"]} for i in inputs])
    with pytest.raises(ValueError, match="'kto' needs the input 'desirable'"):
        KTO()(logprobs[:1], inputs[:1])
    for make in (lambda: DPO(beta=0), lambda: KTO(beta=-1), lambda: DPO(label_smoothing=0.5)):
        with pytest.raises(ValueError):
            make()


def test_losses_have_stable_names_and_groups():
    losses: list[Loss] = [DPO(), RobustDPO(), IPO(), Hinge(), APOZero(), SimPO(), ORPO()]
    assert [loss.name for loss in losses] == ["sigmoid", "robust", "ipo", "hinge", "apo_zero", "simpo", "orpo"]
    assert {loss.group for loss in losses} == {2}
    assert KTO().group == 1


@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_the_reward_model_s_loss_and_its_derivative_are_torch_s(centring):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=n) * 3 for n in (5, 8)]
    last = [np.eye(len(v))[-1] for v in values]
    x = [torch.from_numpy(v).requires_grad_() for v in values]
    good, bad = x[0][-1], x[1][-1]
    total = -logsigmoid(good - bad - 0.5) + centring * (good + bad) ** 2
    expected = torch.autograd.grad(total, x)
    inputs = [{"weights": w, "margin": 0.5 * w} for w in last]
    found = BradleyTerry(centring=centring)(values, inputs)
    assert found.total == pytest.approx(total.item(), abs=1e-12)
    for ours, theirs in zip(found.d_logprobs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), **TIGHT)
    assert found.metrics["margin"] == pytest.approx((good - bad).item())


def test_equal_scores_cost_ln_2_and_far_ones_stay_finite():
    w = [{"weights": np.ones(1)}] * 2
    found = BradleyTerry()([np.zeros(1), np.zeros(1)], w)
    assert (found.total, found.metrics["accuracy"]) == (math.log(2), 0)
    assert BradleyTerry()([np.array([-1e4]), np.array([1e4])], w).total == pytest.approx(2e4)
    with pytest.raises(ValueError, match="without a position"):
        BradleyTerry()([np.zeros(1), np.zeros(1)], [w[0], {"weights": np.zeros(1)}])
