"""The weights of a session by name: which are trained, which a state must hold, and how they were at earlier steps.

Knows parameters, not models or gradients. Used in the lane's thread only. Read next: ``trainer.py``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crucible_kitchen.errors import BackendUserError

__all__ = ["Snapshot", "Weights"]


class Snapshot:
    """The weights as they were at one step.

    Until the next optimizer step it refers to the live weights; ``Weights`` gives it copies just before they change,
    and only if a sampler still holds it.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.holders = 0
        self.copies: dict[str, Tensor] | None = None

    def release(self) -> None:
        """Give up one hold; copies go with the last."""
        self.holders -= 1
        if self.holders <= 0:
            self.copies = None


class Weights:
    """The live weights of one model.

    Args:
        trained: the parameters that are trained, by name.
        fixed: those that are not, but came from the session's seed, so that a state must hold them too.
        reference: whether to keep a copy of the trained ones as they are now.
    """

    def __init__(
        self, trained: Mapping[str, nn.Parameter], fixed: Mapping[str, nn.Parameter], *, reference: bool
    ) -> None:
        self.trained = dict(trained)
        self._held = {**fixed, **trained}
        self._snapshot: Snapshot | None = None
        self._reference: Snapshot | None = None
        if reference:
            self._reference = Snapshot(0)
            self._reference.copies = _copies(self.trained)

    def snapshot(self, version: int) -> Snapshot:
        """Return the weights as they are now, held once more."""
        if self._snapshot is None:
            self._snapshot = Snapshot(version)
        self._snapshot.holders += 1
        return self._snapshot

    def reference(self) -> Snapshot:
        """Return the weights as they were when the session was opened.

        Raises:
            BackendUserError: they were not kept.
        """
        if self._reference is None:
            raise BackendUserError("this session keeps no reference", hint="open it with reference=True")
        return self._reference

    def will_change(self) -> None:
        """Copy the live weights for those who hold them, just before they change."""
        held, self._snapshot = self._snapshot, None
        if held is not None and held.holders > 0:
            held.copies = _copies(self._held)

    @contextmanager
    def as_of(self, snapshot: Snapshot | None) -> Iterator[None]:
        """Compute inside the block with the weights of a snapshot in place of the live ones, None for those."""
        if snapshot is None or snapshot.copies is None:
            yield
            return
        swapped = {n: self._held[n] for n in snapshot.copies}
        live = {n: p.data for n, p in swapped.items()}
        for n, p in swapped.items():
            p.data = snapshot.copies[n]
        try:
            yield
        finally:
            for n, p in swapped.items():
                p.data = live[n]

    def forget_gradients(self) -> None:
        """Leave no gradient of the trained parameters."""
        for p in self.trained.values():
            p.grad = None

    def take_gradients(self) -> list[Tensor]:
        """Return the gradient that autograd left, zero where it left none, and leave none."""
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.trained.values()]
        self.forget_gradients()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return what a state must hold, by name; not copies."""
        return {n: p.detach() for n, p in self._held.items()}

    def fit(self, saved: Mapping[str, Tensor]) -> bool:
        """Whether saved weights are those of this model by names and shapes."""
        return {n: t.shape for n, t in saved.items()} == {n: p.shape for n, p in self._held.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take over saved weights, which fit."""
        self.will_change()
        for n, p in self._held.items():
            p.copy_(saved[n])


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in weights.items()}
