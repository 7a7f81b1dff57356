"""The event loop's own clock and cancel scope, looked up once.

anyio finds its backend anew at every call, which for a stage costs more than what is asked of it. This file knows
nothing of workflows. Read next: ``crucible_kitchen.workflow.engine``.
"""

import asyncio
from collections.abc import Callable

import anyio

__all__ = ["loop_clock", "scope_class"]


def loop_clock() -> Callable[[], float]:
    """Return a function that says what ``anyio.current_time`` says on the running event loop, virtual time included."""
    try:
        return asyncio.get_running_loop().time
    except RuntimeError:  # no asyncio loop runs in this thread: it is trio's
        import trio

        return trio.current_time


def scope_class() -> type[anyio.CancelScope]:
    """Return the running backend's own class of ``anyio.CancelScope``."""
    return type(anyio.CancelScope())
