"""Attention of one decoding step where samples of one prompt share its keys and values.

A prompt's keys and values are stored once. What each sample drew since stands in columns of its own, and its scores
over both go through one softmax, so the result is that of whole rows. Over the prompt the samples' queries are one
matrix product, where each alone would read a copy. Knows queries, keys and values, not models or samples. Read next:
``kvcache.py``, which stores them.

Letters: R rows, n rows of one prompt, H key-value heads, G query heads of each, E width of a head, L positions of a
prompt, A those of the longest, S own columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Prompt", "Reading", "attend", "readings"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What is stored of a prompt: keys and values of each layer, [H, L, E]."""

    pairs: list[tuple[Tensor, Tensor]]
    length: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt and the rows that read it, by number or as a range of them."""

    prompt: Prompt
    rows: Tensor | slice


def readings(prompts: Sequence[Prompt | None], device: torch.device) -> list[Reading]:
    """Return who reads what, given the prompt of each row."""
    by_prompt: dict[Prompt, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if prompt is not None:
            by_prompt.setdefault(prompt, []).append(row)
    return [Reading(prompt, _span(rows, device)) for prompt, rows in by_prompt.items()]


def _span(rows: list[int], device: torch.device) -> Tensor | slice:
    """Return consecutive rows as a range, which is read without a copy."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, readings: Sequence[Reading], layer: int, scale: float
) -> Tensor:
    """Attend from one position of each row to its prompt and its own columns.

    Args:
        q: [R, H * G, 1, E].
        k: own keys, [R, H, S, E].
        v: own values, [R, H, S, E].
        mask: bool [R, 1, 1, A + S], true where a row may look: in its prompt, then in its own columns.
        readings: who reads which prompt; a row that reads none has all it sees in its own columns.
        layer: whose keys and values of the prompts are meant.
        scale: of the scores.

    Returns:
        [R, 1, H * G, E].
    """
    rows, heads, _, width = k.shape
    ahead = mask.shape[-1] - k.shape[2]
    q = (q * scale).reshape(rows, heads, -1, width)
    weights = q.new_empty(*q.shape[:3], mask.shape[-1])
    weights[..., ahead:] = q @ k.mT
    for reading in readings:
        keys = reading.prompt.pairs[layer][0]
        weights[reading.rows, ..., : keys.shape[1]] = _by_row(_by_head(q[reading.rows]) @ keys.mT, q.shape[2])
    weights = weights.masked_fill_(~mask, -torch.inf).softmax(dim=-1)
    out = weights[..., ahead:] @ v
    for reading in readings:
        values = reading.prompt.pairs[layer][1]
        looks = weights[reading.rows, ..., : values.shape[1]]
        out[reading.rows] += _by_row(_by_head(looks) @ values, q.shape[2])
    return out.reshape(rows, 1, -1, width)


def _by_head(x: Tensor) -> Tensor:
    """Shape [H, n * G, ...] from [n, H, G, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


def _by_row(x: Tensor, group: int) -> Tensor:
    """Shape [n, H, G, ...] from [H, n * G, ...]."""
    return x.view(x.shape[0], -1, group, x.shape[2]).transpose(0, 1)
