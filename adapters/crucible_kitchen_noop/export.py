"""The toy model written for use elsewhere: one ``.npy`` file and one JSON file.

Knows no session. Read next: ``crucible_kitchen_noop.session``.
"""

import io
import json
from pathlib import Path

import numpy as np

from crucible_kitchen.types import ExportedModel, Float64Array
from crucible_kitchen_noop.files import storing, write_whole

__all__ = ["write_model"]


def write_model(directory: Path, table: Float64Array, model: str, step: int) -> ExportedModel:
    """Write the table of logits [V, V] and a description into an existing directory."""
    description = {"format": "noop", "architecture": "bigram", "base_model": model, "step": step, "synthetic": True}
    array = io.BytesIO()  # numpy's own writing to a file does not say why a disk took only a part
    np.save(array, table, allow_pickle=False)
    with storing("the exported model"):
        write_whole(directory / "weights.npy", array.getvalue())
        write_whole(directory / "config.json", json.dumps(description, indent=2).encode())
    return ExportedModel(str(directory), "noop", ("config.json", "weights.npy"), model)
