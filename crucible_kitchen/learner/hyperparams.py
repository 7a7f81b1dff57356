"""Hyperparameters from facts: a learning rate from a model's size, a LoRA's true number of parameters.

Starting points, not laws; each function says where its numbers come from. Read next:
``crucible_kitchen.learner.schedules``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from crucible_kitchen.types import SessionInfo

__all__ = ["lora_parameter_count", "recommended_learning_rate"]

REFERENCE_WIDTH = 2048
FULL_RATE = 2e-5
LORA_FACTOR = 10.0
TINY_WIDTH = 256
TINY_RATE = 2e-3


def recommended_learning_rate(info: SessionInfo, *, lora: bool) -> float:
    """Return a peak learning rate for AdamW to start from.

    All weights of a model of width 2048 (about a billion parameters) are commonly fine-tuned at 2e-5; the best rate
    falls about with the width (as under the maximal-update parametrisation, Yang et al. 2022, section 3). LoRA wants
    about ten times the rate of full fine-tuning, whatever its rank, because ``alpha / rank`` takes the rank out
    (Schulman et al., "LoRA Without Regret", 2025). Tiny models that learn from scratch take far more: below a width
    of 256 the rate is 2e-3 (measured on the built-in ``sums``, see ``docs/benchmarks.md``). Never more than that.

    Args:
        info: the session's facts; ``hidden_size`` is the width.
        lora: whether adapters are trained and not all weights.
    """
    if info.hidden_size < TINY_WIDTH:
        return TINY_RATE
    rate = FULL_RATE * REFERENCE_WIDTH / info.hidden_size
    return min(TINY_RATE, rate * (LORA_FACTOR if lora else 1.0))


def lora_parameter_count(config: Mapping[str, Any], rank: int, targets: Sequence[str] = ()) -> int:
    """Return how many parameters LoRA adds to a Llama-like model (Llama, Qwen, Mistral, Gemma, SmolLM).

    Each target of shape [out, in] gets ``rank * (in + out)``; grouped-query attention makes keys and values narrower,
    and a ``head_dim`` of its own makes queries wider or narrower than the model.

    Args:
        config: the model's ``config.json``.
        rank: LoRA rank.
        targets: names of the modules; empty: all linear layers of attention and MLP.

    Raises:
        ValueError: the config is of another architecture, or a target is unknown.
    """
    try:
        width, layers, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        inner = int(config["intermediate_size"])
    except KeyError as error:
        raise ValueError(f"not a Llama-like config: {error} is missing") from None
    head = int(config.get("head_dim") or width // heads)
    queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    shapes = {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    unknown = [t for t in targets if t not in shapes]
    if unknown:
        raise ValueError(f"unknown LoRA target {unknown[0]!r}; there are {', '.join(shapes)}")
    return layers * rank * sum(sum(shapes[t]) for t in (targets or shapes))
