"""How much memory a step took at most.

Knows the device and the operating system's counters, not what is computed. Read next: ``trainer.py``.
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["peak_memory"]


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the metric ``peak_memory_bytes``, empty where nothing counts it.

    On a GPU it is what torch held at most since the last call; on a CPU what the process ever held at most: a step that
    raises it is the one that took most so far.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"peak_memory_bytes": float(peak)}
    with suppress(OSError, StopIteration):  # Linux: what `getrusage` counts there, a process inherits from its parent
        with Path("/proc/self/status").open("rb") as lines:
            return {"peak_memory_bytes": 1024.0 * int(next(x for x in lines if x.startswith(b"VmHWM:")).split()[1])}
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
