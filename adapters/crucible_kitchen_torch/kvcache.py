"""Key-value caches: one of prompts that are being read, one with a row for every sample, each as long as it is.

Knows models by their kind and attention masks, not samples. Read next: ``decoding.py``, which gives out the rows.

Letters: R rows, S columns of the cache, H key-value heads, E width of a head, V vocabulary.
"""

import weakref
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crucible_kitchen.errors import CapabilityError
from crucible_kitchen_torch.models import CausalModel
from crucible_kitchen_torch.tiny import TinyModel
from crucible_kitchen_torch.unpadded_hf import SDPA

__all__ = ["Slots", "prompt_cache", "read_cache"]

Pairs: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer."""

_PROBED: "weakref.WeakSet[CausalModel]" = weakref.WeakSet()
"""Models whose stepping was compared with their plain forward."""

_PROBE_TOLERANCE = 1e-2  # what another arithmetic may do, half precision included; a wrong mask does far more


class _Growing:
    """What the built-in model extends while it reads prompts."""

    def __init__(self) -> None:
        self.pairs: Pairs = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values and return all."""
        if layer == len(self.pairs):
            self.pairs.append((k, v))
        else:
            seen = self.pairs[layer]
            self.pairs[layer] = (torch.cat([seen[0], k], dim=2), torch.cat([seen[1], v], dim=2))
        return self.pairs[layer]


def prompt_cache(model: CausalModel) -> Any:
    """Return an empty cache for ``next_scores`` that keeps every position, whatever window a layer looks through."""
    if isinstance(model.module, TinyModel):
        return _Growing()
    from transformers import DynamicCache

    return DynamicCache()


def read_cache(cache: Any) -> Pairs:
    """Return keys and values, [R, H, S, E] each, of a cache that ``prompt_cache`` made."""
    if isinstance(cache, _Growing):
        return cache.pairs
    return [(layer.keys, layer.values) for layer in cache.layers]


class Slots:
    """Keys and values of many samples: a row each, filled from column 0 to the sample's own length.

    Args:
        model: what computes.
        rows: how many rows there are; grown by ``reserve`` unless ``fixed``.
        columns: how long each is.
        fixed: compute with every row and column at each step, filled or not: then the arithmetic of a row, and with it
            its last bit, never depends on the others.
    """

    def __init__(self, model: CausalModel, rows: int, columns: int, *, fixed: bool) -> None:
        self._model = model
        self._shape = (rows, columns)
        self._fixed = fixed
        self._pairs: Pairs = []
        self._device = next(model.module.parameters()).device
        self._tiny = isinstance(model.module, TinyModel)
        module: Any = model.module
        self._config = None if self._tiny else module.config.get_text_config()
        self._rows = torch.arange(rows, device=self._device)
        self._columns = torch.arange(columns, device=self._device)
        self._at = self._rows  # this step's column of each row
        self._width = 0
        if not self._tiny:
            self._probe()

    def reserve(self, rows: int, columns: int) -> None:
        """Have at least so many rows and columns; what is there is copied into larger tensors."""
        have = self._shape
        if rows <= have[0] and columns <= have[1]:
            return
        self._shape = want = (_grown(have[0], rows), _grown(have[1], columns))
        self._rows = torch.arange(want[0], device=self._device)
        self._columns = torch.arange(want[1], device=self._device)
        self._pairs = [(self._larger(k), self._larger(v)) for k, v in self._pairs]

    def _larger(self, old: Tensor) -> Tensor:
        rows, columns = self._shape
        new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def put(self, rows: list[int], pairs: Pairs, prompt: int, length: int) -> None:
        """Copy the last ``length`` columns of row ``prompt`` of other keys and values to the begin of these rows."""
        if not self._pairs:
            rows_all, columns = self._shape
            self._pairs = [
                (
                    k.new_zeros(rows_all, k.shape[1], columns, k.shape[3]),
                    v.new_zeros(rows_all, v.shape[1], columns, v.shape[3]),
                )
                for k, v in pairs
            ]
        index = torch.tensor(rows, device=self._device)
        for (to_k, to_v), (k, v) in zip(self._pairs, pairs, strict=True):
            to_k[index, :, :length] = k[prompt, :, k.shape[2] - length :]
            to_v[index, :, :length] = v[prompt, :, v.shape[2] - length :]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first columns of one row over another row."""
        for k, v in self._pairs:
            k[target, :, :length] = k[source, :, :length]
            v[target, :, :length] = v[source, :, :length]

    def step(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Compute one more token of each row.

        Args:
            tokens: int64 [R], for the first R rows; all rows if fixed.
            at: int64 [R], the column that each is written to, which is also its position.

        Returns:
            scores of the token after it, [R, V].
        """
        self._at = at = at.to(self._device)
        self._width = self._shape[1] if self._fixed else int(at.max()) + 1
        tokens = tokens.to(self._device)[:, None]
        if self._tiny:
            seen = self._columns[: self._width] <= at[:, None]
            hidden = self._model.module(tokens, positions=at[:, None], mask=seen[:, None, None], cache=self)
            return self._model.head(hidden[:, -1])
        out = self._model.module(
            input_ids=tokens,
            attention_mask=self._masks(at),
            position_ids=at[:, None],
            past_key_values=self,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values, [R, H, 1, E], and return what the rows look at, [R, H, S, E]."""
        count = len(k)
        all_k, all_v = self._pairs[layer]
        index = self._rows[:count]
        all_k[index, :, self._at] = k[:, :, 0].to(all_k.dtype)  # autocast gives either
        all_v[index, :, self._at] = v[:, :, 0].to(all_v.dtype)
        return all_k[:count, :, : self._width], all_v[:count, :, : self._width]

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Do what ``extend`` does, as the models of transformers call it."""
        return self.extend(layer, k, v)

    def get_seq_length(self, _: int = 0) -> int:
        """Return how many columns are filled, as the models of transformers ask for it."""
        return self._width - 1

    def _masks(self, at: Tensor) -> Any:
        """Return what ``attention_mask`` of a model of transformers takes: one mask, or one per kind of layer."""
        columns = self._columns[: self._width]
        full = (columns <= at[:, None])[:, None, None]
        window = getattr(self._config, "sliding_window", None)
        kinds = getattr(self._config, "layer_types", None)
        if window is None or (kinds is not None and "sliding_attention" not in kinds):
            return self._as_taken(full)
        near = full & (columns > at[:, None] - window)[:, None, None]
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
    def _probe(self) -> None:
        """Compare two rows of different length with the model's plain forward, once per model.

        Raises:
            CapabilityError: they differ: its layers keep more than keys and values, or number positions by themselves.
        """
        if self._model in _PROBED:
            return
        _PROBED.add(self._model)
        cause: Exception | None = None
        try:
            same = self._steps_like_the_model()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            same, cause = False, error
        if not same:
            _PROBED.discard(self._model)
            raise CapabilityError(
                f"{self._model.facts.architecture} cannot be sampled here: it needs more than keys and values",
                hint="serve it with an inference server and use sampling_client=openai",
            ) from cause

    def _steps_like_the_model(self) -> bool:
        """Whether a step of two rows gives the scores that the model gives for their whole sequences."""
        size = self._model.facts.vocab_size
        rows = [[i % size for i in ids] for ids in ((2, 7, 1, 8, 2), (5, 3))]
        probe = Slots(self._model, len(rows), 8, fixed=False)
        for row, ids in enumerate(rows):
            tokens = torch.tensor([ids[:-1]], device=self._device)
            positions = torch.arange(len(ids) - 1, device=self._device)[None]
            mask = torch.ones_like(tokens, dtype=torch.bool)
            _, cache = self._model.next_scores(tokens, positions, mask, prompt_cache(self._model))
            probe.put([row], read_cache(cache), 0, len(ids) - 1)
        found = probe.step(torch.tensor([ids[-1] for ids in rows]), torch.tensor([len(ids) - 1 for ids in rows]))
        wanted = [
            self._model.head(self._model.hidden(torch.tensor(ids, device=self._device), [len(ids)])[-1:])[0]
            for ids in rows
        ]
        gap = max(
            float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(found, wanted, strict=True)
        )
        return gap <= _PROBE_TOLERANCE


def _grown(have: int, want: int) -> int:
    return have if want <= have else max(want, have + have // 2)
