"""Losses of several outputs of a model: weighted sums of losses that each read one. Float64.

Every loss of this package is a function of one output: log-probabilities, values (:class:`ValueLoss`,
:class:`BradleyTerry`), log-probabilities of given tokens (:class:`TopKForwardKL`), logits (:class:`GeneralizedJSD`), or
the entropy. An actor with a critic and an entropy bonus is::

    WeightedSum(Term(PPO()), Term(ValueLoss(), "values", 0.5), Term(EntropyBonus(), "entropy", 0.01))

and a reward model ``WeightedSum(Term(BradleyTerry(), "values"))``. Knows no model. Read next:
``crucible_kitchen.types.OutputsLoss``, the protocol it fulfils.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from crucible_kitchen.learner.numerics import spread, trained
from crucible_kitchen.types import Array, Float64Array, Loss, LossValue, Output, OutputsLoss, OutputsLossValue

__all__ = ["EntropyBonus", "Term", "WeightedSum", "of_outputs"]


@dataclass(frozen=True, slots=True)
class EntropyBonus:
    """``-H_t``: less loss for more entropy, exactly (its gradient needs the whole distribution, a capability).

    Called like a loss, with the entropies [T] in place of log-probabilities, nats; input ``weights``. The total is the
    sum over positions of ``-weights * H``. Metric: the sum ``exact_entropy`` over trained positions.
    """

    name: ClassVar[str] = "entropy"
    group: ClassVar[int] = 1

    def __call__(self, entropies: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]], /) -> LossValue:
        """Evaluate one datum.

        Raises:
            ValueError: there are no weights, or not as many as positions.
        """
        now = np.asarray(entropies[0], dtype=np.float64)
        chosen, weights = trained(self.name, loss_inputs[0], len(now))
        h = now[chosen]
        return LossValue(-float(weights @ h), [spread(-weights, chosen, now.shape)], {"exact_entropy": float(h.sum())})


@dataclass(frozen=True, slots=True)
class Term:
    """``coefficient`` times a loss, which reads one output of the model.

    Attributes:
        loss: called with that output in place of log-probabilities; its ``d_logprobs`` are derivatives by the output.
        of: the output.
        coefficient: what its total and derivatives count for; its metrics are not multiplied.
    """

    loss: Loss
    of: Output = "logprobs"
    coefficient: float = 1.0


class WeightedSum:
    """``sum_i coefficient_i * loss_i(output_i)``; fulfils ``crucible_kitchen.types.OutputsLoss``.

    Its group is the largest of its terms'; terms of single datums are evaluated on each datum of a group. Metrics of
    the terms stand side by side; equal names are added up.

    Args:
        terms: one or more.

    Raises:
        ValueError: there are no terms, or two with different groups above 1.
    """

    def __init__(self, *terms: Term) -> None:
        groups = {term.loss.group for term in terms} - {1}
        if not terms or len(groups) > 1:
            raise ValueError(f"a sum needs terms of one group size, or of single datums; got {sorted(groups)}")
        self.terms = terms
        self.group = max(groups, default=1)
        self.name = "+".join(term.loss.name for term in terms)
        self.reads: frozenset[Output] = frozenset(term.of for term in terms)

    def __call__(
        self, outputs: Sequence[Mapping[str, Float64Array]], loss_inputs: Sequence[Mapping[str, Array]], /
    ) -> OutputsLossValue:
        """Evaluate one group.

        Raises:
            ValueError: a term lacks an input.
        """
        total = 0.0
        slopes: list[dict[str, Float64Array]] = [{} for _ in outputs]
        metrics: dict[str, float] = {}
        for term in self.terms:
            size = term.loss.group
            for start in range(0, len(outputs), size):
                members = slice(start, start + size)
                value = term.loss([o[term.of] for o in outputs[members]], loss_inputs[members])
                total += term.coefficient * value.total
                for own, slope in zip(slopes[members], value.d_logprobs, strict=True):
                    scaled = term.coefficient * slope
                    own[term.of] = own[term.of] + scaled if term.of in own else scaled
                _merge(metrics, value.metrics)
        return OutputsLossValue(total, slopes, metrics)

    def __repr__(self) -> str:
        return f"WeightedSum({', '.join(repr(term) for term in self.terms)})"


def of_outputs(loss: Loss | OutputsLoss) -> OutputsLoss:
    """Return a loss in the form that reads outputs by name, whichever form it has."""
    return loss if isinstance(getattr(loss, "reads", None), frozenset) else WeightedSum(Term(loss))  # type: ignore[arg-type,return-value]


def _merge(metrics: dict[str, float], more: Mapping[str, float]) -> None:
    """Add metrics of one evaluation, by the rule of ``LossValue`` where they can be combined two at a time."""
    for key, value in more.items():
        if key not in metrics:
            metrics[key] = value
        elif key.endswith(":max"):
            metrics[key] = max(metrics[key], value)
        elif key.endswith(":min"):
            metrics[key] = min(metrics[key], value)
        else:
            metrics[key] += value
