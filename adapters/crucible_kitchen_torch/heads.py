"""The value head: one number per position from the model's hidden states, and its file beside an exported model.

The number is a policy's value function or a reward model's score, by the loss that trains it. Knows hidden states, not
models. Read next: ``trainer.py``.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from crucible_kitchen.errors import IntegrityError
from crucible_kitchen_torch.faults import storage_errors

__all__ = ["FILE", "ValueHead"]

FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """``v = w h + b``, 0 at first: a new critic does not disturb the policy it shares a trunk with.

    Args:
        width: D.
        device: where it lives.
        dtype: of its weights; it computes in them whatever the model computes in.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [M, D] to [M]."""
        return (hidden.to(self.weight.dtype) * self.weight).sum(dim=-1) + self.bias

    def save(self, directory: Path) -> str:
        """Write the weights beside an exported model and return the file's name."""
        from safetensors.torch import save_file

        plain = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        with storage_errors("the exported value head"):
            save_file(plain, directory / FILE)
        return FILE

    @staticmethod
    def is_in(directory: Path | None) -> bool:
        """Return whether an exported model has one."""
        return directory is not None and (directory / FILE).is_file()

    def read(self, directory: Path | None) -> None:
        """Take over the weights that an export has; without any the head begins anew.

        Raises:
            IntegrityError: the file is not that of a head of this width.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if directory is None or not self.is_in(directory):
            return
        try:
            self.load_state_dict(load_file(directory / FILE))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise IntegrityError(
                f"{FILE} is not the value head of this model: {type(error).__name__}", hint="export the model again"
            ) from error
