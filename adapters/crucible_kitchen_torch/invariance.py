"""The invariance gate: a gradient must not depend on how its batch was split into micro-batches.

Knows gradients and splits, not models. It runs once, on the first batch of a run, and would catch a loss that divides
by the size of what it sees, rows that see each other, or a loss with a memory. Read next: ``trainer.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from crucible_kitchen.errors import TrainingError

__all__ = ["TOLERANCE", "compare", "other_split"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""By the numbers computed in: the largest difference that rounding may make, far above what it does make and far
below any real fault."""

FLOOR = 1e-2
"""A tensor with less than this share of the whole gradient's norm is compared with that share: the gradient of a key's
bias, for one, is zero but for rounding."""


def other_split(batches: Sequence[list[int]], group: int) -> list[list[int]]:
    """Return another split of the same datums: each micro-batch halved, or the last two merged if none can be.

    Args:
        batches: indices of the datums of each micro-batch, at least two groups in all.
        group: how many consecutive datums belong together.
    """
    if all(len(b) == group for b in batches):
        return [*batches[:-2], batches[-2] + batches[-1]]
    halves: list[list[int]] = []
    for batch in batches:
        middle = len(batch) // group // 2 * group
        halves += [half for half in (batch[:middle], batch[middle:]) if half]
    return halves


def compare(names: Sequence[str], grads: Sequence[Tensor], others: Sequence[Tensor], tolerance: float) -> float:
    """Compare two gradients of one batch and return their largest difference, relative to each tensor's norm.

    Args:
        names: of the tensors.
        grads: one gradient.
        others: the other.
        tolerance: the difference that rounding may make.

    Raises:
        TrainingError: it is more than rounding.
    """
    norms = torch.stack(torch._foreach_norm(list(grads))).double()
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(list(grads), list(others)))).double()
    whole = torch.linalg.vector_norm(norms)
    relative = apart / norms.maximum(FLOOR * whole).clamp_min(torch.finfo(torch.float64).tiny)
    worst = int(relative.argmax())
    difference = float(relative[worst])
    if not difference <= tolerance:
        raise TrainingError(
            f"the gradient depends on how the batch is split: {names[worst]} differs by {difference:.1e} of its norm "
            f"between two splits, where rounding makes at most {tolerance:.0e}",
            hint="a custom loss must be a pure sum over its groups; verify_invariance=off skips this check",
        )
    return difference
