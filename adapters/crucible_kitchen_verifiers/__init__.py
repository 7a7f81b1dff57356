"""What runs inside the package ``verifiers`` when its environments are rolled out here: a harness, and the worker.

The package finds a harness by the name of its module, which is this one. Only worker processes import the package, and
until then nothing of it is needed here. Read next: ``worker.py``; ``crucible_kitchen_environments.verifiers``, which
asks it.
"""

from typing import TYPE_CHECKING

from crucible_kitchen.lazy import lazily

if TYPE_CHECKING:
    from crucible_kitchen_verifiers.harness import ChatHarness as ChatHarness

_HOMES = {"harness": ("ChatHarness",)}
__all__ = ["ChatHarness"]

__getattr__ = lazily(__name__, _HOMES)
