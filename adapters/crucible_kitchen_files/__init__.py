"""Adapters on the local disk: datasets from files and built-in tasks, artifacts in a content-addressed directory.

They know no network. Read next: ``datasets`` and ``blobs`` in this package.
"""

from crucible_kitchen_files.blobs import FilesBlobStore
from crucible_kitchen_files.datasets import FilesDatasetStore

__all__ = ["FilesBlobStore", "FilesDatasetStore"]
