"""Base models that several LoRA sessions of one client share: their weights are in memory once.

Each session has modules of its own around the shared tensors, and its adapters sit in those: nothing is switched, and
sessions compute at the same time because nobody writes what is shared. Loads no torch. Read next: ``huggingface.py``.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Hashable
from itertools import chain
from pathlib import Path
from typing import Any

__all__ = ["BaseModels", "Loaded", "fingerprint"]


class Loaded:
    """A loaded model and its tokenizer; kept as long as somebody refers to it."""

    def __init__(self, causal: Any, tokenizer: Any) -> None:
        self.causal = causal
        self.tokenizer = tokenizer

    def shared(self) -> tuple[Any, Any]:
        """Return the model in modules of its own, its parameters and buffers being these; and a tokenizer."""
        tensors = chain(self.causal.parameters(), self.causal.buffers())
        return copy.deepcopy(self.causal, {id(t): t for t in tensors}), copy.deepcopy(self.tokenizer)


class BaseModels:
    """The base models that open sessions of one client hold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakValueDictionary[Hashable, Loaded] = weakref.WeakValueDictionary()

    def get(self, key: Hashable, load: Callable[[], Loaded]) -> Loaded:
        """Return the model of a key, loaded now if no session holds it. Safe to call from several threads."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                found = self._held[key] = load()
            return found


def fingerprint(path: Path | None) -> Hashable:
    """Return what tells whether local files were changed: names, sizes and times; None for a hub id."""
    if path is None:
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return (str(path.absolute()), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()))
