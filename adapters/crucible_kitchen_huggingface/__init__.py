"""Datasets of the Hugging Face hub, or in its local formats, through the package ``datasets``.

It knows no training. Read next: ``store`` in this package.
"""

from crucible_kitchen_huggingface.store import HuggingFaceDatasetStore

__all__ = ["HuggingFaceDatasetStore"]
