"""Where a model lives, and in which numbers it computes.

Weights are float32 or float64. With ``bfloat16`` or ``float16`` only products are computed in half precision, by
torch's autocast; weights, gradients and the optimizer stay float32. Knows no model. Read next: ``models.py``.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from crucible_kitchen.errors import ConfigError
from crucible_kitchen_torch.options import TorchOptions

__all__ = ["Placement", "placement"]

_log = logging.getLogger(__name__)

_SIDE, _TIMES = 192, 3
"""Size of the square matrices that are multiplied to see which numbers are faster, and how often: milliseconds."""

_WORTH = 1.5
"""How much faster half precision must be on a CPU before its rounding is worth it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model lives and in which numbers it computes.

    Attributes:
        device: where.
        dtype: of products, and of everything in float32 and float64.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def weights(self) -> torch.dtype:
        """Numbers of weights, gradients and optimizer."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @contextmanager
    def numbers(self) -> Iterator[None]:
        """Compute in these numbers inside the block; in plain float32 and float64 it does nothing."""
        if self.dtype == self.weights:
            yield
            return
        with torch.autocast(self.device.type, self.dtype):
            yield


def placement(options: TorchOptions) -> Placement:
    """Return where to compute and in which numbers.

    Raises:
        ConfigError: torch does not know the device, or it is not there.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"the device {options.device!r} cannot be used here", hint="device=auto or cpu") from error
    return Placement(device, _fastest(device) if options.dtype == "auto" else getattr(torch, options.dtype))


@cache
def _fastest(device: torch.device) -> torch.dtype:
    """Choose between float32 and bfloat16: by what a GPU supports, on a CPU by trying both once per process."""
    if device.type != "cpu":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        chosen, why = torch.bfloat16 if half else torch.float32, "by what the device supports"
    else:
        whole, part = _seconds(torch.float32), _seconds(torch.bfloat16)
        chosen = torch.bfloat16 if part * _WORTH < whole else torch.float32
        why = f"a product takes {part / whole:.2f} times as long in bfloat16 as in float32"
    _log.warning("dtype=auto: computing in %s (%s)", str(chosen).removeprefix("torch."), why)
    return chosen


def _seconds(dtype: torch.dtype) -> float:
    """Return the CPU seconds of a matrix product in this thread alone, which a busy machine does not change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.ones(_SIDE, _SIDE, dtype=dtype)
        found: list[float] = []
        for _ in range(_TIMES + 1):  # the first prepares
            began = time.thread_time()
            torch.mm(a, a)
            found.append(time.thread_time() - began)
        return min(found[1:])
    finally:
        torch.set_num_threads(threads)
