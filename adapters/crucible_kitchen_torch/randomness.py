"""A session's random numbers: one stream for initialisation and dropout, one for requests without a seed.

Torch's layers draw from a generator of the whole process; a session borrows it for the length of one computation and
puts it back, under a lock, so that sessions in one process never see each other's draws. Read next: ``trainer.py``.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["SessionRng", "uniforms"]

_global = threading.Lock()


class SessionRng:
    """The random state of one session; used in its lane's thread only.

    Args:
        seed: of both streams.
        device: where the model computes.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._seed = seed
        self.requests = 0  # seeds given out so far; saved with the state
        generator = torch.Generator().manual_seed(seed)
        self._cpu = generator.get_state()
        self._gpu = torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None

    @contextmanager
    def borrow(self) -> Iterator[None]:
        """Make this session's stream the process's generator inside the block."""
        with _global:
            devices = [self._device] if self._gpu is not None else []
            with torch.random.fork_rng(devices=devices):
                torch.set_rng_state(self._cpu)
                if self._gpu is not None:
                    torch.cuda.set_rng_state(self._gpu, self._device)
                try:
                    yield
                finally:
                    self._cpu = torch.get_rng_state()
                    if self._gpu is not None:
                        self._gpu = torch.cuda.get_rng_state(self._device)

    def next_seed(self) -> int:
        """Return a new seed for a request that has none."""
        self.requests += 1
        words = np.random.SeedSequence([self._seed, self.requests]).generate_state(1, np.uint64)
        return int(words[0] >> np.uint64(1))

    def tensors(self) -> dict[str, Tensor]:
        """Return the streams' states as uint8 tensors, to be saved."""
        return {"cpu": self._cpu} | ({} if self._gpu is None else {"gpu": self._gpu})

    def restore(self, tensors: dict[str, Tensor], seed: int, requests: int) -> None:
        """Continue where a saved state was."""
        self._cpu = tensors["cpu"].clone()
        if self._gpu is not None and "gpu" in tensors:
            self._gpu = tensors["gpu"].clone()
        self._seed, self.requests = seed, requests

    @property
    def seed(self) -> int:
        """The seed of the session, saved with the state."""
        return self._seed


def uniforms(seed: int, sample: int) -> np.random.Generator:
    """Return the generator that sample ``sample`` of a request with this seed draws from."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([abs(seed), sample])))
