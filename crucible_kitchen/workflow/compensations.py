"""Compensations: what undoes the outside effects of stages that were done, when the run fails and asked for it.

It knows hooks and their arguments, no node. Read next: ``crucible_kitchen.workflow.engine``.
"""

from collections.abc import Callable
from typing import Any

import anyio

from crucible_kitchen.errors import StageTimeout
from crucible_kitchen.loop import EventLoop
from crucible_kitchen.workflow.failures import as_ours, note
from crucible_kitchen.workflow.reports import Reports

__all__ = ["Compensations"]


class Compensations:
    """The compensations of one run, in the order in which their stages were done."""

    def __init__(self, reports: Reports, loop: EventLoop, grace: float) -> None:
        self._reports = reports
        self._grace = grace
        self._now = loop.time
        self._hooks: list[tuple[Callable[..., Any], dict[str, Any], str]] = []

    def add(self, hook: Callable[..., Any], arguments: dict[str, Any], path: str) -> None:
        """Remember how the stage of a path is undone."""
        self._hooks.append((hook, arguments, path))

    async def run(self, failure: Exception) -> None:
        """Undo what was done, newest first, shielded and bounded; what fails is noted with the run's failure."""
        for hook, arguments, path in reversed(self._hooks):
            where, began = f"{path}/rollback", self._now()
            try:
                self._reports.began("rollback", where)
                await self._bounded(hook, arguments)
                self._reports.ended("rollback", where, began)
            except Exception as error:  # noqa: BLE001 - the failure of the run is the one reported
                ours = as_ours(error, where)
                note(failure, [ours])
                self._reports.errored("rollback", where, ours, "skip", began)

    async def _bounded(self, hook: Callable[..., Any], arguments: dict[str, Any]) -> None:
        with anyio.CancelScope(shield=True, deadline=self._now() + self._grace) as scope:
            await hook(**arguments)
        if scope.cancelled_caught:
            raise StageTimeout(f"did not end within {self._grace:g} s", hint="see the config key grace")
