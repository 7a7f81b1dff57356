"""The built-in model as the executor uses it: built from a seed, or read from an export.

Knows ``tiny.py`` and its files, not training. Read next: ``models.py``, the protocol it fulfils.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from crucible_kitchen.errors import CapabilityError, IntegrityError
from crucible_kitchen.types import ExportedModel, SessionSpec
from crucible_kitchen_torch.faults import storage_errors
from crucible_kitchen_torch.lora import add_lora, merge_lora
from crucible_kitchen_torch.models import TINY_TYPE, ModelFacts
from crucible_kitchen_torch.placement import Placement
from crucible_kitchen_torch.tiny import TinyConfig, TinyModel
from crucible_kitchen_torch.tokenizers import ByteTokenizer
from crucible_kitchen_torch.unpadded import Joins, positions, runs

__all__ = ["TinyBackend"]


class TinyBackend:
    """``CausalModel`` of a ``TinyModel``."""

    module: Module
    shares = True

    def __init__(self, model: TinyModel, *, from_seed: bool) -> None:
        self._model = model
        self.from_seed = from_seed
        self.module = model
        self.tokenizer = ByteTokenizer()
        c = model.config
        self.facts = ModelFacts("tiny", c.context, c.vocab_size, c.width, frozenset({self.tokenizer.eos_id}))

    @classmethod
    def open(cls, spec: SessionSpec, place: Placement, path: Path | None) -> "TinyBackend":
        """Build a new model, or read an exported one from a directory."""
        if spec.chat_template is not None:
            raise CapabilityError("the built-in model has a chat rendering of its own", hint="leave out chat_template")
        model = TinyModel(TinyConfig()) if path is None else _read(path)
        model = model.to(device=place.device, dtype=place.weights)
        if spec.lora is not None:
            add_lora(model, spec.lora)
        return cls(model, from_seed=path is None)

    def hidden(self, tokens: Tensor, lengths: Sequence[int], joins: Joins | None = None) -> Tensor:
        """See ``CausalModel``."""
        at = positions(lengths, tokens.device, joins)
        return self._model(tokens[None], positions=at, rows=runs(lengths, joins))[0]  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel``."""
        return self._model.lm_head(hidden)  # type: ignore[no-any-return]

    @property
    def value_width(self) -> int:
        """See ``CausalModel``."""
        return self.facts.hidden_size

    def valued(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel``."""
        return hidden

    def next_scores(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """See ``CausalModel``."""
        look = mask[:, None, None, :]  # [B, 1, 1, S]
        new, seen = tokens.shape[1], mask.shape[1]
        if new > 1:
            # Each position looks back from its own place; a padding row looks at itself, or its softmax is empty.
            causal = mask.new_ones(new, seen).tril(diagonal=seen - new)
            look = (look & causal) | causal.triu(diagonal=seen - new)
        hidden = self._model(tokens, positions=positions, mask=look, cache=cache)
        return self._model.lm_head(hidden[:, -1]), cache

    def export(self, directory: Path) -> ExportedModel:
        """Write config and weights, adapters merged; ``model=DIRECTORY`` reads them again."""
        from safetensors.torch import save_file

        config = {"model_type": TINY_TYPE, **self._model.config.to_json()}
        with storage_errors("the exported model"):
            save_file({k: v.cpu().contiguous() for k, v in merge_lora(self._model).items()}, _weights(directory))
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return ExportedModel(str(directory), "tiny", ("config.json", "model.safetensors"))


def _weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def _read(directory: Path) -> TinyModel:
    """Read an exported model.

    Raises:
        IntegrityError: the files are not those of a tiny model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        values.pop("model_type")
        model = TinyModel(TinyConfig(**values))
        model.load_state_dict(load_file(_weights(directory)))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise IntegrityError(
            f"{directory.name} does not hold a whole tiny model: {type(error).__name__}", hint="export it again"
        ) from error
    return model
