"""Hyperparameters from facts: a learning rate from a model's size, a LoRA's true number of parameters.

Starting points, not laws; each function says where its numbers come from. Read next:
``crucible_kitchen.learner.schedules``.
"""

from collections.abc import Collection, Mapping
from typing import Any

from crucible_kitchen.types import SessionInfo

__all__ = ["LLAMA_LIKE", "lora_parameter_count", "recommended_learning_rate"]

REFERENCE_WIDTH = 2048
FULL_RATE = 2e-5
LORA_FACTOR = 10.0
TINY_WIDTH = 256
TINY_RATE = 2e-3

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


def recommended_learning_rate(info: SessionInfo, *, lora: bool) -> float:
    """Return a peak learning rate for AdamW to start from.

    All weights of a model of width 2048 (about a billion parameters) are commonly fine-tuned at 2e-5; the best rate
    falls about with the width (as under the maximal-update parametrisation, Yang et al. 2022, section 3). LoRA wants
    about ten times the rate of full fine-tuning, whatever its rank, because ``alpha / rank`` takes the rank out
    (Schulman et al., "LoRA Without Regret", 2025). Tiny models that learn from scratch take far more: below a width
    of 256 the rate is 2e-3 (measured on the built-in ``sums``, see ``docs/benchmarks.md``). Never more than that.

    Args:
        info: the session's facts; ``hidden_size`` is the width, taken as 2048 where a server does not tell it (0).
        lora: whether adapters are trained and not all weights.
    """
    width = info.hidden_size or REFERENCE_WIDTH
    if width < TINY_WIDTH:
        return TINY_RATE
    rate = FULL_RATE * REFERENCE_WIDTH / width
    return min(TINY_RATE, rate * (LORA_FACTOR if lora else 1.0))


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
