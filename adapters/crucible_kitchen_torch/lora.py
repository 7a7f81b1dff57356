"""Low-rank adapters for the built-in model, so that ``tiny`` needs torch only.

Models of transformers take theirs from peft (``huggingface.py``). Read next: ``tiny_backend.py``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.types import LoraSpec

__all__ = ["LoraLinear", "add_lora", "check_targets", "merge_lora"]

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``alpha / rank * B A x`` (Hu et al. 2021, section 4.1); B begins at zero."""

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        weight = base.weight
        self.base = base.requires_grad_(requires_grad=False)
        self.lora_a = nn.Parameter(weight.new_empty(spec.rank, base.in_features))
        self.lora_b = nn.Parameter(weight.new_zeros(base.out_features, spec.rank))
        self.lora_dropout = nn.Dropout(spec.dropout)
        self.scale = spec.alpha / spec.rank
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        low = F.linear(F.linear(self.lora_dropout(x), self.lora_a), self.lora_b)
        return self.base(x) + low * self.scale  # type: ignore[no-any-return]

    def merged(self) -> Tensor:
        """Return the weight that gives the same output without an adapter, [out, in]."""
        return (self.base.weight + self.scale * self.lora_b @ self.lora_a).detach()


def check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Check that every target names modules of the model.

    Raises:
        CapabilityError: one names none; the hint lists what there is.
    """
    known = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if n and not any(True for _ in m.children())}
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    names = [n for n, _ in model.named_modules()]
    for target in targets:
        if target not in known and not any(n.endswith("." + target) for n in names):
            raise CapabilityError(
                f"lora_targets names {target!r}, which no module of this model is called",
                hint=f"linear layers here: {', '.join(sorted(linear))}",
            )


def add_lora(model: nn.Module, spec: LoraSpec) -> None:
    """Freeze a model and put adapters on its target modules, in place.

    Raises:
        CapabilityError: a target matches nothing.
    """
    targets = spec.targets or DEFAULT_TARGETS
    check_targets(model, targets)
    model.requires_grad_(requires_grad=False)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in targets and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), leaf, LoraLinear(module, spec))


@torch.no_grad()
def merge_lora(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the model with its adapters merged, under the names they have without adapters."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    merged = {f"{name}.weight": module.merged() for name, module in adapted.items()}
    plain = {n: p.detach() for n, p in model.named_parameters() if not any(n.startswith(f"{a}.") for a in adapted)}
    return plain | merged
