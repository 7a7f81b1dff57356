"""One optimizer step: scale, clip, AdamW; and its moments by name, to be saved.

Knows parameters and gradients, not models. Read next: ``trainer.py``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crucible_kitchen.types import AdamParams

__all__ = ["Adam"]

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Adam:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over named parameters, with settings that may change every step."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params = dict(params)
        self._adam = torch.optim.AdamW(list(self._params.values()), fused=True)

    @staticmethod
    def norm(grads: Sequence[Tensor], scale: float) -> float:
        """Multiply the gradients by ``scale`` in place and return their global L2 norm."""
        if scale != 1.0:
            torch._foreach_mul_(list(grads), scale)
        return float(torch.nn.utils.get_total_norm(list(grads)))

    def apply(self, grads: Sequence[Tensor], norm: float, params: AdamParams) -> None:
        """Clip the gradients, whose norm is known, and update the parameters."""
        if 0 < params.grad_clip_norm < norm:
            torch._foreach_mul_(list(grads), params.grad_clip_norm / norm)
        for p, g in zip(self._params.values(), grads, strict=True):
            p.grad = g
        for group in self._adam.param_groups:
            group.update(
                lr=params.learning_rate,
                betas=(params.beta1, params.beta2),
                eps=params.eps,
                weight_decay=params.weight_decay,
            )
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments and step counts by parameter; empty before the first step."""
        return {
            f"{moment}/{name}": self._adam.state[p][moment]
            for name, p in self._params.items()
            if p in self._adam.state
            for moment in MOMENTS
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved moments; parameters without any begin anew."""
        self._adam.state.clear()
        for name, p in self._params.items():
            if f"step/{name}" not in tensors:
                continue
            moments = {m: tensors[f"{m}/{name}"].clone() for m in MOMENTS}
            self._adam.state[p] = {m: t if m == "step" else t.to(p.device) for m, t in moments.items()}
