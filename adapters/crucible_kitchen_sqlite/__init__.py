"""The model registry in a SQLite file.

Read next: ``crucible_kitchen_sqlite.registry``.
"""

from crucible_kitchen_sqlite.registry import SqliteModelRegistry as SqliteModelRegistry

__all__ = ["SqliteModelRegistry"]
