"""Names of a package that are imported when they are first used, so that importing the package costs nothing.

It knows module paths, not what they hold. Read next: ``crucible_kitchen/__init__.py``, which uses it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` (PEP 562).

    Args:
        package: the package's ``__name__``.
        homes: by module below the package, the names that come from it.

    Example::

        __getattr__ = lazily(__name__, {"kitchen": ("Kitchen", "run")})
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def resolve(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return resolve
