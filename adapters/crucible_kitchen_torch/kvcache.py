"""Key-value caches: one of prompts that are being read, one with a row for every sample, each as long as it is.

Knows models by their kind and attention masks, not samples. Read next: ``decoding.py``, which gives out the rows.

Letters: R rows, S columns of the cache, H key-value heads, E width of a head, V vocabulary.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from crucible_kitchen.errors import CapabilityError
from crucible_kitchen_torch.models import CausalModel
from crucible_kitchen_torch.prompts import Prompt, Reading, attend, readings
from crucible_kitchen_torch.tiny import TinyCache, TinyModel
from crucible_kitchen_torch.unpadded_hf import SDPA, attending

__all__ = ["Slots", "prompt_cache", "read_cache"]

Pairs: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer."""

Begin: TypeAlias = "Callable[[Slots, list[int], Pairs, int, int], None]"
"""``Slots.share`` or ``Slots.copy``."""

WORTH_SHARING = 512
"""Fewest positions that sharing a prompt keeps from being stored again: attention in parts costs a little."""

NOWHERE = torch.iinfo(torch.int64).max
"""The position of a column in which there is nothing."""

_SHARES: "weakref.WeakKeyDictionary[CausalModel, bool]" = weakref.WeakKeyDictionary()
"""Models whose stepping was compared with their plain forward, and whether rows of them may share a prompt."""

_PROBE_TOLERANCE = 1e-2  # what another arithmetic may do, half precision included; a wrong mask does far more


def prompt_cache(model: CausalModel) -> Any:
    """Return an empty cache for ``next_scores`` that keeps every position, whatever window a layer looks through."""
    if isinstance(model.module, TinyModel):
        return TinyCache()
    from transformers import DynamicCache

    return DynamicCache()


def read_cache(cache: Any) -> Pairs:
    """Return keys and values, [R, H, S, E] each, of a cache that ``prompt_cache`` made."""
    if isinstance(cache, TinyCache):
        return cache.pairs
    return [(layer.keys, layer.values) for layer in cache.layers]


class Slots:
    """Keys and values of many samples: a row each, filled from column 0 to the sample's own length.

    Args:
        model: what computes.
        rows: how many rows there are; grown as needed unless ``fixed``.
        columns: how long each is.
        fixed: compute with every row and column at each step, filled or not: then the arithmetic of a row, and with it
            its last bit, never depends on the others.
    """

    def __init__(self, model: CausalModel, rows: int = 0, columns: int = 0, *, fixed: bool = False) -> None:
        self._model = model
        self._shape = (rows, columns)
        self._fixed = fixed
        self._pairs: Pairs = []
        self._prompts: list[Prompt | None] = [None] * rows  # what each row shares with others
        self._readings: list[Reading] = []  # this step's
        self._device = next(model.module.parameters()).device
        self._tiny = isinstance(model.module, TinyModel)
        module: Any = model.module
        self._config = None if self._tiny else module.config.get_text_config()
        self._rows = torch.arange(rows, device=self._device)
        self._columns = torch.arange(columns, device=self._device)
        self._at = self._rows  # this step's column of each row
        self._width = 0

    def put(self, rows: list[int], pairs: Pairs, prompt: int, length: int, upto: int) -> None:
        """Let rows begin with the last ``length`` columns of row ``prompt`` of other keys and values.

        Args:
            rows: a row each for the samples of this prompt.
            pairs: keys and values, [P, H, S, E] of each layer.
            prompt: which of the P.
            length: of the prompt.
            upto: how many positions a row may need.
        """
        own = [(k[prompt, :, k.shape[2] - length :], v[prompt, :, v.shape[2] - length :]) for k, v in pairs]
        shares = _may_share(self._model)
        if shares and not self._fixed and (len(rows) - 1) * length >= WORTH_SHARING:
            self.share(rows, own, length, upto)
        else:
            self.copy(rows, own, length, upto)

    def share(self, rows: list[int], own: Pairs, length: int, upto: int) -> None:
        """Store keys and values, [H, L, E] of each layer, once; the rows' columns hold what comes after."""
        self._reserve(rows, own, upto - length)
        prompt = Prompt([(k.clone(), v.clone()) for k, v in own], length)
        for row in rows:
            self._prompts[row] = prompt

    def copy(self, rows: list[int], own: Pairs, length: int, upto: int) -> None:
        """Write keys and values into the first columns of every row."""
        self._reserve(rows, own, upto)
        for row in rows:
            self._prompts[row] = None
        index = torch.tensor(rows, device=self._device)
        for (to_k, to_v), (k, v) in zip(self._pairs, own, strict=True):
            to_k[index, :, :length] = k
            to_v[index, :, :length] = v

    def _reserve(self, rows: list[int], own: Pairs, columns: int) -> None:
        """Have these rows and so many columns; what is there is copied into larger tensors."""
        self._prompts += [None] * (max(rows) + 1 - len(self._prompts))
        have = self._shape
        self._shape = want = (_grown(have[0], max(rows) + 1), _grown(have[1], columns))
        if not self._pairs:
            self._pairs = [(k.new_zeros(0, *k.shape)[..., :0, :], v.new_zeros(0, *v.shape)[..., :0, :]) for k, v in own]
        elif want == have:
            return
        self._rows = torch.arange(want[0], device=self._device)
        self._columns = torch.arange(want[1], device=self._device)
        self._pairs = [(self._larger(k), self._larger(v)) for k, v in self._pairs]

    def _larger(self, old: Tensor) -> Tensor:
        rows, columns = self._shape
        new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def keys_read(self, rows: int) -> int:
        """Return how many numbers of keys each layer's attention reads in a step of so many rows, at most."""
        if not self._pairs:
            return 0
        _, heads, columns, width = self._pairs[0][0].shape
        shared = sum(prompt.length for prompt in set(self._prompts[:rows]) if prompt)
        return (rows * columns + shared) * heads * width

    def move(self, source: int, target: int, length: int) -> None:
        """Put one row, of so many positions, in another's place."""
        prompt = self._prompts[target] = self._prompts[source]
        columns = length - (prompt.length if prompt else 0)
        for k, v in self._pairs:
            k[target, :, :columns] = k[source, :, :columns]
            v[target, :, :columns] = v[source, :, :columns]

    def step(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Compute one more token of each row.

        Args:
            tokens: int64 [R], for the first R rows, the others being gone; all rows if fixed.
            at: int64 [R], the position of each.

        Returns:
            scores of the token after it, [R, V].
        """
        del self._prompts[len(tokens) :]
        self._readings = readings(self._prompts, self._device)
        begins = torch.tensor([prompt.length if prompt else 0 for prompt in self._prompts])
        own = at - begins
        self._width = self._shape[1] if self._fixed else int(own.max()) + 1
        self._at, at = own.to(self._device), at.to(self._device)[:, None]
        places = self._places(begins.to(self._device)[:, None])
        tokens = tokens.to(self._device)[:, None]
        if self._tiny:
            mask = (places <= at)[:, None, None]
            return self._model.head(self._model.module(tokens, positions=at, mask=mask, cache=self)[:, -1])
        with attending(self._attend if self._readings else None):
            out = self._model.module(
                input_ids=tokens,
                attention_mask=self._masks(places, at),
                position_ids=at,
                past_key_values=self,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def _places(self, begins: Tensor) -> Tensor:
        """Return the position of everything that a row may look at, [R or 1, A + S]; beyond all others: none.

        Args:
            begins: int64 [R, 1], how many positions a row shares.
        """
        own = self._columns[: self._width]
        if not self._readings:
            return own[None]
        shared = torch.arange(int(begins.max()), device=self._device)
        return torch.cat([shared.where(shared < begins, NOWHERE), begins + own], dim=1)

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values, [R, H, 1, E], and return what the rows have, [R, H, S, E].

        As the models of transformers call it.
        """
        count = len(k)
        all_k, all_v = self._pairs[layer]
        index = self._rows[:count]
        all_k[index, :, self._at] = k[:, :, 0].to(all_k.dtype)  # autocast gives either
        all_v[index, :, self._at] = v[:, :, 0].to(all_v.dtype)
        return all_k[:count, :, : self._width], all_v[:count, :, : self._width]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Write this step's keys and values and attend, as the built-in model calls it."""
        k, v = self.update(k, v, layer)
        if self._readings:
            return self._attend(layer, q, k, v, mask, None)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
        return attend(q, k, v, mask, self._readings, layer, q.shape[3] ** -0.5 if scale is None else scale)

    def get_seq_length(self, _: int = 0) -> int:
        """Return how many columns are filled, as the models of transformers ask for it."""
        return self._width - 1

    def _masks(self, places: Tensor, at: Tensor) -> Any:
        """Return what ``attention_mask`` of a model of transformers takes: one mask, or one per kind of layer."""
        full = (places <= at)[:, None, None]
        window = getattr(self._config, "sliding_window", None)
        kinds = getattr(self._config, "layer_types", None)
        if window is None or (kinds is not None and "sliding_attention" not in kinds):
            return self._as_taken(full)
        near = full & (places > at - window)[:, None, None]
        if kinds is None:
            return self._as_taken(near)
        return {"full_attention": self._as_taken(full), "sliding_attention": self._as_taken(near)}

    def _as_taken(self, mask: Tensor) -> Tensor:
        """Return a mask as the model's attention takes it: booleans, or numbers to add."""
        if getattr(self._config, "_attn_implementation", "sdpa") in SDPA:
            return mask
        dtype = next(self._model.module.parameters()).dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


@torch.no_grad()
def _may_share(model: CausalModel) -> bool:
    """Return whether rows of a model may share a prompt. The first time, steps are compared with its plain forward.

    Raises:
        CapabilityError: they differ: its layers keep more than keys and values, or number positions by themselves.
    """
    if model not in _SHARES:
        wrong = _wrong(model, Slots.copy)
        if wrong is not None:
            raise CapabilityError(
                f"{model.facts.architecture} cannot be sampled here: it needs more than keys and values",
                hint="serve it with an inference server and use sampling_client=openai",
            ) from wrong
        _SHARES[model] = (
            model.shares
            and not torch.is_autocast_enabled(next(model.module.parameters()).device.type)
            and _wrong(model, Slots.share) is None
        )
    return _SHARES[model]


def _wrong(model: CausalModel, begin: Begin) -> Exception | None:
    """Return what is wrong with a step of rows that begin in this way, or None."""
    try:
        gap = _gap(model, begin)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return error
    return None if gap <= _PROBE_TOLERANCE else ValueError(f"scores differ by {gap:.1e}")


def _gap(model: CausalModel, begin: Begin) -> float:
    """Return how far the scores of a step of three rows, two of one prompt, are from those of their whole sequences."""
    device = next(model.module.parameters()).device
    size = model.facts.vocab_size
    slots = Slots(model)
    steps: list[tuple[int, int]] = []
    wanted: list[Tensor] = []
    for prompt, last in ((2, 7, 1, 8), (2, 4)), ((5,), (3,)):
        ids = torch.tensor([prompt], device=device) % size
        at = torch.arange(len(prompt), device=device)[None]
        _, cache = model.next_scores(ids, at, torch.ones_like(ids, dtype=torch.bool), prompt_cache(model))
        pairs = [(k[0], v[0]) for k, v in read_cache(cache)]
        begin(slots, [len(steps) + i for i in range(len(last))], pairs, len(prompt), len(prompt) + 1)
        for token in last:
            steps.append((token % size, len(prompt)))
            whole = torch.cat([ids[0], ids.new_tensor([token % size])])
            wanted.append(model.head(model.hidden(whole, [len(whole)])[-1:])[0])
    found = slots.step(torch.tensor([token for token, _ in steps]), torch.tensor([at for _, at in steps]))
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(found, wanted, strict=True))


def _grown(have: int, want: int) -> int:
    return have if want <= have else max(want, have + have // 2)
