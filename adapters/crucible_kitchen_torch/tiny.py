"""The built-in model ``tiny``: a small Llama-shaped transformer of our own, about 0.6 M parameters.

It knows torch and ``unpadded.py``: no tokenizer, no training, no file. Read next: ``tiny_backend.py``.

Shapes: B rows, T positions of this call, S positions in the cache (T included), H heads, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crucible_kitchen_torch.unpadded import Run, attend_by_run

__all__ = ["TinyCache", "TinyConfig", "TinyModel"]

Rows: TypeAlias = Sequence[Run]


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """The shape of a tiny model; what ``config.json`` of an export holds.

    Attributes:
        vocab_size: V.
        width: D, a multiple of twice ``heads``.
        layers: number of blocks.
        heads: H.
        inner: width of the SwiGLU layer.
        context: longest sequence, tokens.
        rope_base: base of the rotary frequencies.
    """

    vocab_size: int = 262
    width: int = 128
    layers: int = 3
    heads: int = 16
    inner: int = 344
    context: int = 2048
    rope_base: float = 10_000.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


class TinyCache:
    """Keys and values of the positions seen so far, [B, H, S, D / H] of each layer."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Append this call's keys and values, and attend to all: [B, T, H, D / H]."""
        if layer == len(self.pairs):
            self.pairs.append((k, v))
        else:
            seen = self.pairs[layer]
            self.pairs[layer] = (torch.cat([seen[0], k], dim=2), torch.cat([seen[1], v], dim=2))
        return F.scaled_dot_product_attention(q, *self.pairs[layer], attn_mask=mask).transpose(1, 2)


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (Zhang & Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021) to [B, H, T, D / H] with halves paired, as Llama does."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], look: Tensor | Rows | None, cache: TinyCache | None, layer: int
    ) -> Tensor:
        """Attend from [B, T, D] to itself (``look`` None: causal; runs: each row of them causal) or to the cache.

        To the cache it attends under a boolean mask [B, 1, T, S].
        """
        rows, length, width = x.shape
        q, k, v = (
            p(x).view(rows, length, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if isinstance(look, Sequence):
            y = attend_by_run(_causal, q, k, v, look)
        elif cache is not None and look is not None:
            y = cache.attend(layer, q, k, v, look)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o_proj(y.reshape(rows, length, width))  # type: ignore[no-any-return]


def _causal(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    look = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=look).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer 2020)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.width)
        self.attention = Attention(config)
        self.post_norm = RMSNorm(config.width)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], look: Tensor | Rows | None, cache: TinyCache | None, layer: int
    ) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x = x + self.attention(self.input_norm(x), rope, look, cache, layer)
        return x + self.mlp(self.post_norm(x))  # type: ignore[no-any-return]


class TinyModel(nn.Module):
    """The transformer; its output embedding is a matrix of its own.

    Initialisation uses torch's global generator: whoever constructs it seeds it.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of standard deviation 1 / sqrt(fan in), residual outputs shrunk by the depth."""
        shrink = 1 / math.sqrt(2 * self.config.layers)
        for name, p in self.named_parameters():
            if p.ndim < 2:
                continue
            std = 0.5 if name.startswith("embed") else 1 / math.sqrt(p.shape[1])
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=std * shrink if residual else std)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, [1 or B, 1, T, D / 2H], of positions [T] or [B, T]."""
        half = self.config.width // self.config.heads // 2
        steps = torch.arange(half, device=positions.device, dtype=torch.float32) / half
        angles = positions[..., None].float() * self.config.rope_base**-steps
        angles = angles.reshape(-1, 1, positions.shape[-1], half)
        dtype = self.embed.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        rows: Rows | None = None,
        cache: TinyCache | None = None,
    ) -> Tensor:
        """Return final hidden states.

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T], or [T] of every row; None counts from 0.
            mask: boolean [B, 1, T, S], True where attention may look; None is causal without a cache.
            rows: what stands one after another in the only row, in place of a mask.
            cache: what came before; this call's keys and values are appended.

        Returns:
            [B, T, D], normed, ready for ``lm_head``.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = self.rope(positions)
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask if rows is None else rows, cache, layer)
        return self.norm(x)  # type: ignore[no-any-return]
