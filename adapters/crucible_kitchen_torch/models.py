"""What the executor needs of a model, and how a name becomes one.

Knows neither training nor sampling. Read next: ``tiny_backend.py`` and ``huggingface.py``, the two kinds of model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from crucible_kitchen.errors import ModelNotFound
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.types import ExportedModel, SessionSpec
from crucible_kitchen_torch.bases import BaseModels
from crucible_kitchen_torch.placement import Placement
from crucible_kitchen_torch.unpadded import Joins

__all__ = ["CausalModel", "ModelFacts", "open_model", "resolve"]

TINY_TYPE = "crucible-tiny"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What ``SessionInfo`` tells of a model and the executor cannot count by itself.

    ``observation_size`` is 0 for models of tokens; for a policy ``vocab_size`` is the number of its actions.
    """

    architecture: str
    context_length: int
    vocab_size: int
    hidden_size: int
    end_ids: frozenset[int]
    observation_size: int = 0

    @property
    def reads(self) -> str:
        """The name of the model's input."""
        return "observations" if self.observation_size else "tokens"


class CausalModel(Protocol):
    """A language model as the executor uses it; used in one thread only.

    Letters: B rows, T positions of a call, S positions seen so far, N positions of several rows, M chosen positions,
    D width, V vocabulary.
    """

    module: nn.Module
    """Its parameters are trained where ``requires_grad`` says so, saved and frozen by name."""

    facts: ModelFacts

    from_seed: bool
    """Whether its weights, frozen ones included, came from the session's seed: then a state must hold all of them."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        ...

    shares: bool
    """Whether ``hidden`` takes rows that continue others."""

    def hidden(self, tokens: Tensor, lengths: Sequence[int], joins: Joins | None = None) -> Tensor:
        """Map rows that stand one after another, int64 [N], to what ``head`` takes, [N, D].

        Args:
            tokens: the rows.
            lengths: T of each, N in all. No row sees another, and positions begin at 0 in each.
            joins: rows that continue others: they see the first positions of those, and are numbered after them.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Map [M, D] to scores [M, V]."""
        ...

    @property
    def value_width(self) -> int:
        """Width of what the value head takes."""
        ...

    def valued(self, hidden: Tensor) -> Tensor:
        """Map what ``hidden`` gave to what the value head takes, [M, D]."""
        ...

    def next_scores(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Score the token after the last of each row, and extend the cache.

        Args:
            tokens: int64 [B, T], padded on the *left*.
            positions: int64 [B, T].
            mask: bool [B, S], true where there is a token; S counts the cache and this call.
            cache: an empty one of ``kvcache.prompt_cache``, then what the last call returned.

        Returns:
            scores [B, V] and the cache.
        """
        ...

    def export(self, directory: Path) -> ExportedModel:
        """Write the model with what was trained."""
        ...


def resolve(model: str) -> Path | None:
    """Return the local path a model name means, or None for ``tiny`` and hub ids.

    Raises:
        ModelNotFound: it reads as a path and there is nothing.
    """
    if model == "tiny":
        return None
    path = Path(model).expanduser()
    if path.exists():
        return path
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf")
    if looks_local or not model or "\\" in model:
        raise ModelNotFound(
            f"there is no model at {model!r}", hint="give `tiny`, an existing directory, a .gguf file or a hub id"
        )
    return None


def open_model(spec: SessionSpec, place: Placement, bases: BaseModels) -> CausalModel:
    """Load or build the model of a session; the caller has seeded torch's generator.

    Raises:
        ModelNotFound: there is no such model.
        CapabilityError: the LoRA asked for does not fit the model.
        MissingExtra: a package that this model needs is not installed.
    """
    if spec.mlp is not None:
        from crucible_kitchen_torch.mlp import MlpModel

        return MlpModel.open(spec, place)
    path = resolve(spec.model)
    if spec.model == "tiny" or (path is not None and _is_tiny(path)):
        from crucible_kitchen_torch.tiny_backend import TinyBackend

        return TinyBackend.open(spec, place, path)
    from crucible_kitchen_torch.huggingface import HuggingFaceModel

    return HuggingFaceModel.open(spec, place, path, bases)


def _is_tiny(path: Path) -> bool:
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("model_type") == TINY_TYPE
