"""Values, entropy, named tokens and logits: their gradients are autograd's, in one piece and in many."""

import numpy as np
import pytest
import torch

from crucible_kitchen.learner import EntropyBonus, GeneralizedJSD, Term, TopKForwardKL, ValueLoss, WeightedSum
from crucible_kitchen.types import Datum, LossValue, SessionSpec
from crucible_kitchen_torch import accumulate, logprobs
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.trainer import Trainer


class Weighted:
    """The weighted sum of log-probabilities."""

    name, group = "weighted", 1

    def __call__(self, found, inputs, /):
        w = inputs[0]["weights"].astype(np.float64)
        return LossValue(float(w @ found[0]), [w])


def trainer(tmp_path):
    options = TorchOptions("cpu", "float64", None, 4096, deterministic=False, verify_invariance="off")
    t = Trainer(SessionSpec("tiny", None, 0, str(tmp_path), value_head=True), options)
    with torch.no_grad():
        t.value.weight.copy_(torch.linspace(-1, 1, len(t.value.weight), dtype=torch.float64))
    return t


def datums(vocab, k=3):
    rng = np.random.default_rng(0)
    found = []
    for number, length in enumerate((5, 9, 2)):
        plain = Datum.from_tokens(
            rng.integers(2, 200, length + 1), rng.random(length + 1) * (rng.random(length + 1) < 0.7)
        )
        scores = rng.normal(size=(length, vocab))
        every = torch.log_softmax(torch.from_numpy(scores), -1).numpy()
        tokens = np.argsort(-every, axis=-1)[:, :k]
        more = {
            "returns": rng.normal(size=length),
            "teacher_tokens": tokens,
            "teacher_logprobs": np.take_along_axis(every, tokens, -1),
            "teacher_logits": scores,
        }
        found.append(Datum(plain.inputs, {**plain.loss_inputs, **more}, str(number)))
    return found


def in_torch(t, datum, loss):
    """The loss of one datum as autograd sees it."""
    x = {name: torch.from_numpy(np.asarray(v)) for name, v in datum.loss_inputs.items()}
    hidden = t.model.hidden(torch.from_numpy(datum.inputs["tokens"]), [len(datum)])
    scores, w = t.model.head(hidden), x["weights"].double()
    every = scores.log_softmax(-1)
    if loss == "together":
        values = hidden @ t.value.weight + t.value.bias
        entropy = -(every.exp() * every).sum(-1)
        picked = every.gather(1, x["target_tokens"][:, None])[:, 0]
        return (w * (picked + 0.5 * (values - x["returns"]) ** 2 / 2 - 0.1 * entropy)).sum()
    if loss == "top":
        p = x["teacher_logprobs"].exp()
        p = p / p.sum(-1, keepdim=True)
        return (w * (p * (p.log() - every.gather(1, x["teacher_tokens"]))).sum(-1)).sum()
    s, q = (scores / 2).log_softmax(-1), (x["teacher_logits"] / 2).log_softmax(-1)
    m = (0.7 * s.exp() + 0.3 * q.exp()).log()
    return (w * (0.3 * (q.exp() * (q - m)).sum(-1) + 0.7 * (s.exp() * (s - m)).sum(-1))).sum()


LOSSES = {
    "together": WeightedSum(Term(Weighted()), Term(ValueLoss(), "values", 0.5), Term(EntropyBonus(), "entropy", 0.1)),
    "top": WeightedSum(Term(TopKForwardKL(), "top_logprobs")),
    "logits": WeightedSum(Term(GeneralizedJSD(beta=0.3, temperature=2.0), "logits")),
}


@pytest.mark.parametrize("scores", [1 << 24, 600], ids=["one_piece", "pieces"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_every_output_is_that_of_autograd(tmp_path, monkeypatch, loss, scores):
    monkeypatch.setattr(logprobs, "SCORES_AT_ONCE", scores)
    monkeypatch.setattr(accumulate, "LOGITS_AT_ONCE", scores)
    t = trainer(tmp_path)
    rows = datums(t.model.facts.vocab_size)
    total = Accumulation()
    (*_, result) = t.gradient(rows, LOSSES[loss], total, None)
    found = torch.cat([g.flatten() for g in total.total()])
    expected = sum(in_torch(t, d, loss) for d in rows)
    grads = torch.autograd.grad(expected, list(t.weights.trained.values()), allow_unused=True)
    flat = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(t.weights.trained.values(), grads, strict=True)
        ]
    )
    assert result.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float((found - flat).norm() / flat.norm()) <= 1e-12
