"""Distillation: TRL's own numbers, torch's gradients of the formulas, what the reverse KL's gradient is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crucible_kitchen.learner import GeneralizedJSD, ImportanceSampling, TopKForwardKL, reverse_kl_advantages

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text(encoding="utf-8"))["jsd"]
TIGHT = {"rtol": 0, "atol": 1e-10}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"beta={c['beta']} temperature={c['temperature']}")
def test_the_generalised_jsd_is_trl_s(case):
    student, teacher = np.array(GOLDEN["student"]), np.array(GOLDEN["teacher"])
    loss = GeneralizedJSD(beta=case["beta"], temperature=case["temperature"])
    found = loss([student], [{"weights": np.ones(len(student)), "teacher_logits": teacher}])
    assert found.total == pytest.approx(case["loss"], abs=1e-10)
    np.testing.assert_allclose(found.d_logprobs[0], case["gradient"], **TIGHT)
    assert found.metrics["jsd"] == pytest.approx(found.total)


def draw(seed, length=9, vocabulary=11):
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(length) < 0.7, 0.5, 0.0).astype(np.float32)
    student, teacher = 3 * rng.normal(size=(2, length, vocabulary))
    teacher[weights == 0] = np.nan
    return student, teacher, weights


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_jsd_s_derivative_is_torch_s_with_weights_and_holes(seed, beta):
    student, teacher, weights = draw(seed)
    x, kept = torch.from_numpy(student).requires_grad_(), torch.from_numpy(weights) != 0
    s, t = torch.log_softmax(x[kept] / 2, -1), torch.log_softmax(torch.from_numpy(teacher)[kept] / 2, -1)
    m = torch.log((1 - beta) * s.exp() + beta * t.exp())
    forward, reverse = (t.exp() * (t - s)).sum(-1), (s.exp() * (s - t)).sum(-1)
    mixed = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    total = (torch.from_numpy(weights)[kept] * {0.0: forward, 1.0: reverse}.get(beta, mixed)).sum()
    total.backward()
    found = GeneralizedJSD(beta=beta, temperature=2.0)([student], [{"weights": weights, "teacher_logits": teacher}])
    assert found.total == pytest.approx(total.item(), abs=1e-10)
    np.testing.assert_allclose(found.d_logprobs[0], x.grad.numpy(), **TIGHT)
    assert found.metrics["tokens"] == (weights != 0).sum()


def test_the_jsd_jumps_at_its_ends_and_is_about_beta_times_the_forward_kl_near_them():
    student, teacher = np.array(GOLDEN["student"]), np.array(GOLDEN["teacher"])
    inputs = [{"weights": np.ones(len(student)), "teacher_logits": teacher}]
    forward, near = (GeneralizedJSD(beta=b)([student], inputs).total for b in (0.0, 1e-6))
    assert near / 1e-6 == pytest.approx(forward, rel=1e-2)


def test_logits_far_apart_stay_finite():
    x = np.array([[0.0, -1e4, 1e4]])
    for beta in (0.0, 0.5, 1.0):
        found = GeneralizedJSD(beta=beta)([x], [{"weights": np.ones(1), "teacher_logits": -x}])
        assert np.isfinite([found.total, *found.d_logprobs[0][0]]).all()


def top(teacher, k):
    logprobs = torch.log_softmax(torch.from_numpy(teacher), -1)
    return torch.topk(logprobs, k, dim=-1)


@pytest.mark.parametrize("rest", ["renormalize", "tail"])
@pytest.mark.parametrize("seed", range(3))
def test_top_k_forward_kl_and_its_derivative_are_torch_s(seed, rest):
    student, teacher, weights = draw(seed)
    kept = torch.from_numpy(weights) != 0
    t, places = top(np.nan_to_num(teacher), 4)
    x = torch.log_softmax(torch.from_numpy(student), -1).gather(1, places).detach().requires_grad_()
    s, target = x, t
    if rest == "tail":
        s, target = (torch.cat([y, torch.log(1 - y.exp().sum(-1, keepdim=True))], -1) for y in (x, t))
    else:
        target = torch.log_softmax(t, -1)
    total = (torch.from_numpy(weights) * (target.exp() * (target - s)).sum(-1))[kept].sum()
    total.backward()
    t = torch.where(kept[:, None], t, torch.nan)
    inputs = {"weights": weights, "teacher_logprobs": t.numpy()}
    found = TopKForwardKL(rest=rest)([x.detach().numpy()], [inputs])
    assert found.total == pytest.approx(total.item(), abs=1e-10)
    np.testing.assert_allclose(found.d_logprobs[0], x.grad.numpy(), **TIGHT)


def test_a_tail_is_trl_s_bucket():
    p, q = np.array(GOLDEN["tails"])
    inputs = {"weights": np.ones(len(p)), "teacher_logprobs": q[:, :-1]}
    found = TopKForwardKL(rest="tail")([p[:, :-1]], [inputs])
    assert found.total == pytest.approx((np.exp(q) * (q - p)).sum(), abs=1e-10)


def test_all_tokens_in_the_top_k_make_the_forward_kl():
    student, teacher = (
        torch.log_softmax(torch.tensor(GOLDEN[n], dtype=torch.float64), -1).numpy() for n in ("student", "teacher")
    )
    weights = np.ones(len(student))
    whole = GeneralizedJSD(beta=0.0)([student], [{"weights": weights, "teacher_logits": teacher}]).total
    for rest in ("renormalize", "tail"):
        found = TopKForwardKL(rest=rest)([student], [{"weights": weights, "teacher_logprobs": teacher}])
        assert found.total == pytest.approx(whole, abs=1e-6)


def test_fewer_than_k_tokens_may_be_given():
    s = np.log([[0.5, 0.3, 0.1]])
    for rest in ("renormalize", "tail"):
        found = TopKForwardKL(rest=rest)(
            [s], [{"weights": np.ones(1), "teacher_logprobs": np.array([[np.log(0.6), np.log(0.2), -np.inf]])}]
        )
        fewer = TopKForwardKL(rest=rest)(
            [s[:, :2]], [{"weights": np.ones(1), "teacher_logprobs": np.log([[0.6, 0.2]])}]
        )
        assert np.isfinite(found.total)
        if rest == "renormalize":
            assert found.total == pytest.approx(fewer.total)


def test_on_policy_distillation_has_the_gradient_of_the_reverse_kl():
    x = torch.tensor(GOLDEN["student"][0], dtype=torch.float64).requires_grad_()
    s, t = torch.log_softmax(x, -1), torch.log_softmax(torch.tensor(GOLDEN["teacher"][0], dtype=torch.float64), -1)
    expected = torch.autograd.grad((s.exp() * (s - t)).sum(), x, retain_graph=True)[0]
    now = s.detach().numpy()
    advantages = reverse_kl_advantages(now[:, None], t.numpy()[:, None])[:, 0]
    weights = np.exp(now)  # every token, as often as it is sampled
    d = ImportanceSampling()([now], [{"logprobs": now, "advantages": advantages, "weights": weights}]).d_logprobs[0]
    found = torch.autograd.grad(s, x, torch.from_numpy(d))[0]
    np.testing.assert_allclose(found.numpy(), expected.numpy(), **TIGHT)


def test_reverse_kl_advantages_look_ahead_as_far_as_the_discount_says():
    student, teacher = np.array([-1.0, np.nan, -2, -3]), np.array([-2.0, 7, -1, -3.5])
    mask = np.array([True, False, True, True])
    np.testing.assert_allclose(reverse_kl_advantages(student, teacher, mask=mask), [-1, 0, 1, -0.5])
    found = reverse_kl_advantages(student, teacher, mask=mask, discount=0.5, coefficient=2.0)
    np.testing.assert_allclose(found, [-2 + 0.5 * (2 - 0.5), 0, 2 - 0.5, -1])
    both = reverse_kl_advantages([student, student], [teacher, teacher], mask=[mask, mask], discount=1.0)
    np.testing.assert_allclose(both, [[-0.5, 0, 0.5, -0.5]] * 2)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        reverse_kl_advantages([0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        reverse_kl_advantages([0.0], [-np.inf])
    for make in (lambda: GeneralizedJSD(beta=1.5), lambda: GeneralizedJSD(temperature=0.0)):
        with pytest.raises(ValueError):
            make()
    student, teacher, weights = draw(0)
    with pytest.raises(ValueError, match="needs the input 'teacher_logits'"):
        GeneralizedJSD()([student], [{"weights": weights}])
    with pytest.raises(ValueError, match="'teacher_logprobs' of shape"):
        TopKForwardKL()([student], [{"weights": weights, "teacher_logprobs": teacher[:, :2]}])
