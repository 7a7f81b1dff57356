"""The toy model written for use elsewhere: one ``.npy`` file and one JSON file.

Knows no session. Read next: ``crucible_kitchen_noop.session``.
"""

import json
from pathlib import Path

import numpy as np

from crucible_kitchen.types import ExportedModel, Float64Array
from crucible_kitchen_noop.files import storing

__all__ = ["write_model"]


def write_model(directory: Path, table: Float64Array, model: str, step: int) -> ExportedModel:
    """Write the table of logits [V, V] and a description into an existing directory."""
    description = {"format": "noop", "architecture": "bigram", "base_model": model, "step": step, "synthetic": True}
    with storing("the exported model"):
        np.save(directory / "weights.npy", table, allow_pickle=False)
        (directory / "config.json").write_text(json.dumps(description, indent=2))
    return ExportedModel(str(directory), "noop", ("config.json", "weights.npy"), model)
