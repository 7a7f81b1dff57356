"""Policy losses: TRL's own numbers, torch's gradients of the formulas, clips that bind, sums that split."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crucible_kitchen.learner import (
    CISPO,
    GSPO,
    PPO,
    DecoupledPPO,
    ImportanceSampling,
    ValueLoss,
    token_weights,
    truncated_importance_weights,
)
from crucible_kitchen.types import Loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text(encoding="utf-8"))["policy"]
TIGHT = {"rtol": 0, "atol": 1e-10}


def draw(seed, length=40):
    """Inputs of one datum: near and far ratios, holes whose inputs are nonsense, float32 as backends send them."""
    rng = np.random.default_rng(seed)
    now = -rng.exponential(1.0, length)
    far = rng.choice([0.05, 0.6, 3.0], length)
    inputs = {
        "logprobs": now + far * rng.normal(size=length),
        "proximal_logprobs": now + 0.3 * rng.normal(size=length),
        "reference_logprobs": now + rng.normal(size=length),
        "advantages": rng.normal(size=length),
        "weights": np.where(rng.random(length) < 0.7, rng.choice([0.25, 1.0], length), 0.0),
    }
    for name in ("logprobs", "reference_logprobs", "advantages"):
        inputs[name] = np.where(inputs["weights"] == 0, np.nan, inputs[name])
    return now, {name: x.astype(np.float32) for name, x in inputs.items()}


def torch_inputs(inputs):
    """The inputs as torch has them, zero where the weight is."""
    trained = torch.from_numpy(inputs["weights"]) != 0
    read = {name: torch.from_numpy(x).double() for name, x in inputs.items()}
    return {name: torch.where(trained, x, torch.zeros_like(x)) for name, x in read.items()}


def ppo(rho, a, low=0.2, high=0.2, dual=None):
    loss = torch.maximum(-rho * a, -torch.clamp(rho, 1 - low, 1 + high) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(-dual * a, loss), loss)


def gspo(x, t):
    mask = (t["weights"] != 0).double()
    s = torch.exp(((x - t["logprobs"]) * mask).sum() / mask.sum())
    return ppo(s, t["advantages"], 3e-4, 4e-4)


def decoupled(x, t, excess):
    w = torch.exp(t["proximal_logprobs"] - t["logprobs"])
    w = torch.where(w > 1.5, torch.zeros_like(w) if excess == "mask" else torch.full_like(w, 1.5), w)
    return w * ppo(torch.exp(x - t["proximal_logprobs"]), t["advantages"])


def rho(x, t):
    return torch.exp(torch.clamp(x - t["logprobs"], -20, 20))


FORMULAS = {
    "importance_sampling": (ImportanceSampling(), lambda x, t: -rho(x, t) * t["advantages"]),
    "ppo": (PPO(), lambda x, t: ppo(rho(x, t), t["advantages"])),
    "clip higher": (PPO(clip_high=0.28), lambda x, t: ppo(rho(x, t), t["advantages"], high=0.28)),
    "dual clip": (PPO(dual_clip=3.0), lambda x, t: ppo(rho(x, t), t["advantages"], dual=3.0)),
    "cispo": (CISPO(ratio_max=2.0), lambda x, t: -torch.clamp(rho(x, t), 0, 2).detach() * t["advantages"] * x),
    "gspo": (GSPO(), gspo),
    "decoupled": (DecoupledPPO(cap=1.5), lambda x, t: decoupled(x, t, "mask")),
    "decoupled truncated": (DecoupledPPO(cap=1.5, excess="truncate"), lambda x, t: decoupled(x, t, "truncate")),
    "k2": (PPO(kl_coef=0.3), lambda x, t: ppo(rho(x, t), t["advantages"]) + 0.15 * (x - t["reference_logprobs"]) ** 2),
    "k3": (
        ImportanceSampling(kl_coef=0.3, kl_estimator="k3"),
        lambda x, t: (
            -rho(x, t) * t["advantages"]
            + 0.3 * (torch.exp(t["reference_logprobs"] - x) - (t["reference_logprobs"] - x) - 1)
        ),
    ),
    "entropy": (PPO(entropy_coef=0.1), lambda x, t: ppo(rho(x, t), t["advantages"]) + 0.05 * x**2),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_and_its_derivative_are_torch_s(name, seed):
    loss, formula = FORMULAS[name]
    now, inputs = draw(seed)
    x = torch.from_numpy(now).requires_grad_()
    t = torch_inputs(inputs)
    total = (t["weights"] * torch.where(t["weights"] != 0, formula(x, t), 0.0)).sum()
    total.backward()
    found = loss([now], [inputs])
    assert found.total == pytest.approx(total.item(), abs=1e-10, rel=1e-13)
    np.testing.assert_allclose(found.d_logprobs[0], x.grad.numpy(), rtol=1e-13, atol=1e-10)


def trl_loss(case):
    """Our loss, aggregation and divisor for one of TRL's cases."""
    kind, options = case["loss_type"], {"kl_coef": case.get("beta", 0.0), "kl_estimator": "k3"}
    if kind == "cispo":
        return CISPO(ratio_max=case["epsilon_high"], **options), "token_mean"
    clip = {"clip_low": 0.2, "clip_high": case.get("epsilon_high", 0.2), "dual_clip": case.get("delta")}
    cls = GSPO if case.get("importance_sampling_level") == "sequence" else PPO
    aggregation = {"grpo": "sequence_mean", "dr_grpo": "dr_grpo", "dapo": "token_mean", "luspo": "sequence_sum"}[kind]
    return cls(**clip, **options), aggregation


def named(case):
    return " ".join(str(v) for k, v in case.items() if k not in ("loss", "gradient", "clipped"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=named)
def test_a_batch_of_sums_scaled_once_is_trl_s_loss(case):
    arrays = {name: np.array(GOLDEN[name]) for name in ("logprobs", "old", "reference", "mask", "advantages")}
    loss, aggregation = trl_loss(case)
    total, divisor, gradients, clipped, tokens = 0.0, 0.0, [], 0.0, 0.0
    for now, old, reference, mask, advantage in zip(*arrays.values(), strict=True):
        weights, share = token_weights(mask, aggregation, max_length=10)
        inputs = {"logprobs": old, "reference_logprobs": reference, "weights": weights}
        value = loss([now], [inputs | {"advantages": np.full(len(now), advantage)}])
        total, divisor = total + value.total, divisor + share
        gradients.append(value.d_logprobs[0])
        clipped, tokens = clipped + value.metrics["clipped"], tokens + value.metrics["tokens"]
    assert total / divisor == pytest.approx(case["loss"], abs=1e-10)
    np.testing.assert_allclose(np.array(gradients) / divisor, case["gradient"], **TIGHT)
    if case["clipped"] and loss.name == "ppo" and loss.dual_clip is None:
        assert clipped / tokens == pytest.approx(case["clipped"][0], abs=1e-12)


@pytest.mark.parametrize("loss", [ImportanceSampling(), PPO(), CISPO(), GSPO(), DecoupledPPO()], ids=lambda x: x.name)
def test_at_a_ratio_of_one_every_loss_has_the_gradient_of_reinforce(loss):
    now = -np.arange(1.0, 6.0)
    weights, advantages = np.array([0, 1, 1, 0.5, 0]), np.full(5, 0.7)
    inputs = {"logprobs": now, "proximal_logprobs": now, "advantages": advantages, "weights": weights}
    if loss.name == "gspo":
        weights = inputs["weights"] = np.array([0, 1.0, 1, 1, 0])
    np.testing.assert_allclose(loss([now], [inputs]).d_logprobs[0], -weights * advantages, **TIGHT)


def test_decoupled_with_equal_policies_is_ppo():
    now, inputs = draw(0)
    inputs["proximal_logprobs"] = inputs["logprobs"]
    ours, plain = DecoupledPPO()([now], [inputs]), PPO()([now], [inputs])
    assert ours.total == plain.total
    np.testing.assert_array_equal(ours.d_logprobs[0], plain.d_logprobs[0])


@pytest.mark.parametrize("name", FORMULAS)
def test_log_ratios_of_ten_thousand_nats_stay_finite(name):
    loss, _ = FORMULAS[name]
    far = np.array([1e4, -1e4, 1e4, -1e4])
    inputs = dict.fromkeys(("logprobs", "proximal_logprobs", "reference_logprobs"), np.zeros(4))
    found = loss([far], [inputs | {"advantages": np.array([1.0, 1, -1, -1]), "weights": np.ones(4)}])
    assert np.isfinite([found.total, *found.d_logprobs[0], *found.metrics.values()]).all()


@pytest.mark.parametrize("name", [name for name in FORMULAS if "gspo" not in name])
def test_a_sum_does_not_depend_on_where_it_is_split(name):
    loss, _ = FORMULAS[name]
    now, inputs = draw(5)
    whole = loss([now], [inputs])
    parts = [loss([now[s]], [{k: x[s] for k, x in inputs.items()}]) for s in (slice(11), slice(11, None))]
    assert sum(p.total for p in parts) == pytest.approx(whole.total, rel=1e-12)
    np.testing.assert_array_equal(np.concatenate([p.d_logprobs[0] for p in parts]), whole.d_logprobs[0])
    for key, value in whole.metrics.items():
        combine = max if key.endswith(":max") else sum
        assert combine(p.metrics[key] for p in parts) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_nothing_trained_is_nothing(name):
    loss, _ = FORMULAS[name]
    now, inputs = draw(0)
    inputs["weights"] = np.zeros_like(inputs["weights"])
    found = loss([now], [inputs])
    assert found.total == 0
    assert not found.d_logprobs[0].any()
    assert found.metrics["tokens"] == 0


def test_metrics_are_sums_of_what_they_name():
    now, old = np.log([0.5, 0.5, 0.5]), np.log([0.25, 0.5, 1.0])
    inputs = {"logprobs": old, "advantages": np.array([1.0, 1, 1]), "weights": np.ones(3)}
    metrics = PPO(kl_coef=0.1)([now], [inputs | {"reference_logprobs": np.log([0.5, 0.5, 1.0])}]).metrics
    assert metrics["tokens"] == 3
    assert metrics["clipped"] == 1
    assert metrics["ratio"] == pytest.approx(3.5)
    assert metrics["ratio:max"] == pytest.approx(2)
    assert metrics["approx_kl"] == pytest.approx((2 - 1 - np.log(2)) + (0.5 - 1 + np.log(2)))
    assert metrics["entropy"] == pytest.approx(3 * np.log(2))
    assert metrics["kl"] == pytest.approx(2 - 1 - np.log(2))
    assert metrics["policy_loss"] == pytest.approx(-1.2 - 1 - 0.5)


def test_a_missing_or_short_input_is_named():
    now, inputs = draw(0)
    del inputs["proximal_logprobs"]
    with pytest.raises(ValueError, match="'decoupled_ppo' needs the input 'proximal_logprobs'"):
        DecoupledPPO()([now], [inputs])
    inputs["advantages"] = inputs["advantages"][:3]
    with pytest.raises(ValueError, match="'advantages' of 40 positions"):
        PPO()([now], [inputs])


def test_parameters_that_mean_nothing_are_refused():
    for make in (
        lambda: PPO(clip_low=-0.1),
        lambda: GSPO(clip_high=-0.1),
        lambda: PPO(dual_clip=1.0),
        lambda: CISPO(ratio_min=2.0, ratio_max=1.0),
    ):
        with pytest.raises(ValueError):
            make()


def test_losses_are_values():
    assert PPO(clip_high=0.28) == dataclasses.replace(PPO(), clip_high=0.28)
    losses: list[Loss] = [PPO(), GSPO(), CISPO(), ImportanceSampling(), DecoupledPPO()]
    assert len({loss.name for loss in losses}) == 5
    assert {loss.group for loss in losses} == {1}


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_and_its_derivative_are_torch_s(clip):
    rng = np.random.default_rng(0)
    values, returns, old = rng.normal(size=(3, 50))
    old = values + rng.choice([0.1, 1.0], 50) * old
    weights = np.where(rng.random(50) < 0.7, 0.5, 0.0)
    v, r, o = torch.from_numpy(values).requires_grad_(), torch.from_numpy(returns), torch.from_numpy(old)
    squares = (v - r) ** 2
    if clip is not None:
        squares = torch.maximum(squares, (o + torch.clamp(v - o, -clip, clip) - r) ** 2)
    total = 0.5 * (torch.from_numpy(weights) * squares).sum()
    total.backward()
    found = ValueLoss(clip=clip)([values], [{"returns": returns, "weights": weights, "values": old}])
    assert found.total == pytest.approx(total.item(), abs=1e-10)
    np.testing.assert_allclose(found.d_logprobs[0], v.grad.numpy(), **TIGHT)


def test_importance_weights_are_cut_as_trl_s_modes_are():
    ours, theirs = np.log([0.5, 0.5, 0.9, 0.2]), np.log([0.5, 0.1, 0.3, 0.4])
    mask = [True, True, True, False]
    cases = {
        "token_truncate": [1, 2, 2, 0],
        "token_mask": [1, 0, 0, 0],
        "sequence_truncate": [2, 2, 2, 0],
        "sequence_mask": [0, 0, 0, 0],
    }
    for mode, expected in cases.items():
        np.testing.assert_allclose(truncated_importance_weights(ours, theirs, mask, mode=mode), expected)
    np.testing.assert_allclose(truncated_importance_weights(ours, theirs, floor=0.6, mode="token_mask"), [1, 0, 0, 0])
    np.testing.assert_allclose(truncated_importance_weights(ours, theirs, cap=20.0, mode="sequence_mask"), 7.5)
