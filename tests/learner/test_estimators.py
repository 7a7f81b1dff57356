"""Estimators: what they expect and what their gradients are, exactly, over a small distribution; aggregation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import explained_variance_score

from crucible_kitchen.learner import PPO, entropy_estimate, explained_variance, k1, k2, k3, token_weights


def distributions():
    generator = torch.Generator().manual_seed(3)
    logits, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64) * 1.5
    return logits.requires_grad_(), torch.log_softmax(reference, -1)


def expectation(estimator):
    logits, q = distributions()
    p = torch.log_softmax(logits, -1).detach().numpy()
    return float(np.exp(p) @ estimator(p, q.numpy())), float(np.exp(p) @ (p - q.numpy()))


def test_k1_and_k3_expect_the_kl_and_k2_does_not():
    for estimator in (k1, k3):
        found, kl = expectation(estimator)
        assert found == pytest.approx(kl, abs=1e-12)
    found, kl = expectation(k2)
    assert abs(found - kl) > 0.05


def gradient_on_samples(loss):
    """The expected gradient by the logits of a loss of samples of the policy, summed over what can be sampled."""
    logits, q = distributions()
    p = torch.log_softmax(logits, -1)
    n = len(q)
    inputs = {"logprobs": p.detach().numpy(), "reference_logprobs": q.numpy(), "advantages": np.zeros(n)}
    d = loss([p.detach().numpy()], [inputs | {"weights": p.exp().detach().numpy()}]).d_logprobs[0]
    return torch.autograd.grad(p, logits, torch.from_numpy(d))[0].numpy()


def gradient(function):
    logits, q = distributions()
    return torch.autograd.grad(function(torch.log_softmax(logits, -1), q), logits)[0].numpy()


def test_k2_in_the_loss_has_the_gradient_of_the_reverse_kl_and_k3_of_the_forward():
    reverse = gradient(lambda p, q: (p.exp() * (p - q)).sum())
    forward = gradient(lambda p, q: (q.exp() * (q - p)).sum())
    found2, found3 = (gradient_on_samples(PPO(kl_coef=1.0, kl_estimator=name)) for name in ("k2", "k3"))
    np.testing.assert_allclose(found2, reverse, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found3, forward, rtol=0, atol=1e-12)
    assert np.abs(found3 - reverse).max() > 1e-2


def test_the_entropy_term_has_the_gradient_of_the_entropy():
    falling = gradient(lambda p, _: (p.exp() * p).sum())
    np.testing.assert_allclose(gradient_on_samples(PPO(entropy_coef=1.0)), falling, rtol=0, atol=1e-12)


@given(st.lists(st.floats(-1e4, 0), min_size=1), st.data())
def test_k2_and_k3_are_never_negative_and_always_finite(p, data):
    q = data.draw(st.lists(st.floats(-1e4, 0), min_size=len(p), max_size=len(p)))
    for found in (k2(p, q), k3(p, q)):
        assert (found >= 0).all()
        assert np.isfinite(found).all()
    assert not k3(p, p).any()


def test_entropy_is_the_mean_surprise_of_what_was_sampled():
    assert entropy_estimate(np.log([0.5, 0.25, 0.1]), [True, True, False]) == pytest.approx(1.5 * math.log(2))
    assert entropy_estimate([]) == 0


def test_explained_variance_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    values, returns = rng.normal(size=(2, 30))
    values += returns
    mask = rng.random(30) < 0.6
    expected = explained_variance_score(returns[mask], values[mask])
    assert explained_variance(values, returns, mask) == pytest.approx(expected, abs=1e-12)
    assert explained_variance(returns, returns) == 1
    assert math.isnan(explained_variance([1.0, 2], [3.0, 3]))
    assert math.isnan(explained_variance([], []))


def test_aggregations_weigh_tokens_as_their_names_say():
    mask = [False, True, True, True, False]
    expected = {
        "token_mean": (1, 3),
        "sequence_mean": (1 / 3, 1),
        "dr_grpo": (1 / 8, 1),
        "sequence_sum": (1, 1),
    }
    for name, (weight, divisor) in expected.items():
        found = token_weights(mask, name, max_length=8)
        np.testing.assert_allclose(found.weights, weight * np.array(mask))
        assert found.divisor == divisor
    assert not token_weights([False, False], "sequence_mean").weights.any()
    with pytest.raises(ValueError, match="max_length"):
        token_weights(mask, "dr_grpo")
    with pytest.raises(ValueError, match="no aggregation 'mean'"):
        token_weights(mask, "mean")
