"""The attention function that lets models of transformers compute rows without padding between them.

Registered with transformers under a name of ours, it serves every family that takes its attention from there. What a
row may look at comes from the model's own mask functions, windows included. Without rows to separate it is
transformers' own ``sdpa``. Read next: ``huggingface.py``.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crucible_kitchen_torch.unpadded import Joins, Run, attend_by_run, looks_back, runs

__all__ = ["SDPA", "attending", "separated", "use_unpadded"]

NAME = "crucible_kitchen_rows"
SDPA = ("sdpa", NAME)
"""Names under which attention takes boolean masks."""

_LAYERS = {"full_attention", "sliding_attention"}
_current = threading.local()  # the rows of the forward pass under way in this thread, and who attends in it


Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, Tensor, float | None], Tensor]
"""Maps a layer's number, queries [B, H, T, E], keys, values, mask and scale to [B, T, H, E]."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """What stands in a mask's place: the runs, and the mask of a row of each, [1, 1, T, S], or None if causal."""

    runs: Sequence[Run]
    masks: Sequence[Tensor | None]


def use_unpadded(causal: Any) -> bool:
    """Let a model use our attention function, if it can; whether it then computes the same must be tried out."""
    from transformers import AttentionInterface, AttentionMaskInterface

    kinds = getattr(causal.config.get_text_config(), "layer_types", None) or ()
    if causal.config._attn_implementation != "sdpa" or not set(kinds) <= _LAYERS:
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    causal.set_attn_implementation(NAME)
    return bool(causal.config._attn_implementation == NAME)


@contextmanager
def separated(lengths: Sequence[int], joins: Joins | None = None) -> Iterator[None]:
    """Compute one row [1, N] inside the block as rows of these lengths, some of which may continue others."""
    _current.runs = runs(lengths, joins)
    try:
        yield
    finally:
        _current.runs = None


@contextmanager
def attending(attend: Attend | None) -> Iterator[None]:
    """Attend by this function inside the block; None: as transformers does."""
    _current.attend = attend
    try:
        yield
    finally:
        _current.attend = None


def _mask(**given: Any) -> Any:
    """Make what transformers passes to attention as its mask; the arguments are those of its ``sdpa_mask``."""
    from transformers.masking_utils import sdpa_mask

    found: list[Run] | None = getattr(_current, "runs", None)
    if found is None:
        return sdpa_mask(**given)
    window = given.get("local_size")
    masks: list[Tensor | None] = []
    for run in found:
        if run.shared:
            masks.append(_looks_back(run, window, given))
            continue
        if not given.get("use_vmap") and (window is None or run.length <= window):
            masks.append(None)
            continue
        size = {"q_length": run.length, "kv_length": run.length, "q_offset": run.start, "kv_offset": run.start}
        masks.append(sdpa_mask(**(given | size | {"allow_is_causal_skip": False})))
    return _Rows(found, masks)


def _looks_back(run: Run, window: int | None, given: dict[str, Any]) -> Tensor:
    """Make the mask of a row that continues another.

    Raises:
        ValueError: the model has masks of its own making.
    """
    if given.get("use_vmap"):
        raise ValueError("a mask function of the model's own is made for whole rows")
    return looks_back(run, given["device"], window)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attend: Attend | None = getattr(_current, "attend", None)
    if attend is not None:
        layer: Any = module.layer_idx
        return attend(layer, query, key, value, attention_mask, given.get("scaling")), None
    if not isinstance(attention_mask, _Rows):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]
    masks = attention_mask.masks

    def of_run(q: Tensor, k: Tensor, v: Tensor, run: int) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, masks[run], **given)[0]  # type: ignore[no-any-return]

    return attend_by_run(of_run, query, key, value, attention_mask.runs), None
