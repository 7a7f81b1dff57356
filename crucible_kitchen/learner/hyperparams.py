"""Starting points: a learning rate for a model's size, and how many parameters a LoRA really has.

It knows what a session says about its model and what stands in a ``config.json``; it loads nothing.
Read next: ``crucible_kitchen.learner.schedules``.
"""

from collections.abc import Collection, Mapping
from typing import Any

from crucible_kitchen.types import SessionInfo

__all__ = ["LLAMA_LIKE", "lora_parameter_count", "recommended_learning_rate"]

_BASE = 5e-5
_LORA = 10.0
_WIDTH = 2000
_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
_OTHER = 0.5
_TINY, _TINY_LORA = 3e-3, 1e-2
_LOWEST, _HIGHEST = 1e-6, 1e-2

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

LLAMA_LIKE = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
    }
)
"""``model_type`` of the architectures whose layers have the seven linear modules of Llama and no others."""


def recommended_learning_rate(info: SessionInfo, lora: bool) -> float:
    """Return a learning rate to start from (AdamW, supervised training).

    Full weights: ``5e-5 · (2000 / hidden_size)^a``, wider models taking smaller rates; LoRA takes ten times that,
    whatever its rank as long as ``lora_alpha`` is constant. Both after Schulman et al. 2025, "LoRA Without Regret"
    (Thinking Machines), who swept rates over Llama and Qwen models: the best rate of LoRA was about ten times that of
    full fine-tuning everywhere, and the exponents fitted were 0.781 for Llama and 0.0775 for Qwen. For other
    architectures 0.5 stands in between, a guess. The built-in ``tiny`` model begins from random weights and takes
    3e-3 (LoRA on it: 1e-2).

    Args:
        info: architecture and hidden size; a hidden size of 0 (unknown) counts as 2000.
        lora: whether a LoRA is trained, or all weights.

    Returns:
        The rate, between 1e-6 and 1e-2.
    """
    if "tiny" in (info.model, info.architecture.lower()):
        return _TINY_LORA if lora else _TINY
    words = f"{info.architecture} {info.model}".lower()
    exponent = next((value for name, value in _EXPONENTS.items() if name in words), _OTHER)
    width = (_WIDTH / info.hidden_size) ** exponent if info.hidden_size else 1.0
    return float(min(_HIGHEST, max(_LOWEST, _BASE * width * (_LORA if lora else 1.0))))


def lora_parameter_count(config: Mapping[str, Any], rank: int, targets: Collection[str] = ()) -> int:
    """Return how many parameters a LoRA of this rank adds to a model.

    A module with ``in`` inputs and ``out`` outputs gets A [rank, in] and B [out, rank] (Hu et al. 2021, section 4.1),
    that is ``rank · (in + out)``. With H hidden size, I intermediate size, D head size, Q and K numbers of query and
    key-value heads (grouped-query attention), the (in, out) of each of the layers are::

        q_proj  H, Q·D      k_proj, v_proj  H, K·D      o_proj  Q·D, H
        gate_proj, up_proj  H, I                        down_proj  I, H

    and ``lm_head`` is H, V once for the model.

    Args:
        config: the model's ``config.json``; its ``model_type`` must be one of ``LLAMA_LIKE``.
        rank: of the LoRA, 1 or more.
        targets: names of modules that get one; empty: the seven of every layer.

    Raises:
        ValueError: the architecture is not known here, the config lacks a number, or a target does not exist.
    """
    if rank < 1:
        raise ValueError(f"the rank must be 1 or more, is {rank}")
    shapes = _module_shapes(config)
    unknown = sorted(set(targets) - set(shapes))
    if unknown:
        raise ValueError(f"the model has no module {unknown[0]!r}; its modules: {', '.join(shapes)}")
    chosen = set(targets) or {*_ATTENTION, *_MLP}
    layers = _number(config, "num_hidden_layers")
    return rank * sum(sum(shapes[name]) * (1 if name == "lm_head" else layers) for name in chosen)


def _module_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every linear module, by its name."""
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise ValueError(
            f"the modules of model_type {kind!r} are not known here; known: {', '.join(sorted(LLAMA_LIKE))}"
        )
    hidden, inner = _number(config, "hidden_size"), _number(config, "intermediate_size")
    heads = _number(config, "num_attention_heads")
    key_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    return {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, key_heads * head),
        "v_proj": (hidden, key_heads * head),
        "o_proj": (heads * head, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
        "lm_head": (hidden, _number(config, "vocab_size")),
    }


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"the model's config has no {key!r} of 1 or more")
    return value
