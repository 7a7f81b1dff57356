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
        self._moments: dict[str, dict[str, Tensor]] = {}

    @staticmethod
    def norm(grads: Sequence[Tensor], scale: float) -> float:
        """Multiply the gradients by ``scale`` in place and return their global L2 norm."""
        if scale != 1.0:
            torch._foreach_mul_(list(grads), scale)
        return float(torch.nn.utils.get_total_norm(list(grads)))

    @torch.no_grad()
    def apply(self, grads: Sequence[Tensor], norm: float, params: AdamParams) -> None:
        """Clip the gradients, whose norm is known, and update the parameters."""
        if 0 < params.grad_clip_norm < norm:
            torch._foreach_mul_(list(grads), params.grad_clip_norm / norm)
        if not self._moments:
            self._moments = {name: _zeros(p) for name, p in self._params.items()}
        moments = [self._moments[name] for name in self._params]
        steps = [m["step"] for m in moments]
        torch._foreach_add_(steps, 1)
        # The kernel of torch.optim.AdamW(fused=True). The class itself imports torch's compiler: a second of CPU.
        torch._fused_adamw_(
            list(self._params.values()),
            list(grads),
            [m["exp_avg"] for m in moments],
            [m["exp_avg_sq"] for m in moments],
            [],
            steps,
            lr=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            weight_decay=params.weight_decay,
            eps=params.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments and step counts by parameter; empty before the first step."""
        return {f"{moment}/{name}": m[moment] for name, m in self._moments.items() for moment in MOMENTS}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved moments; parameters without any begin anew."""
        self._moments = {}
        for name, p in self._params.items():
            self._moments[name] = _zeros(p)
            if f"step/{name}" in tensors:
                saved = {m: tensors[f"{m}/{name}"].clone() for m in MOMENTS}
                self._moments[name] = {m: t.to(p.device) for m, t in saved.items()}


def _zeros(p: Tensor) -> dict[str, Tensor]:
    return {
        "exp_avg": torch.zeros_like(p, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
    }
