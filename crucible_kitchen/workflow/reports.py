"""What the engine tells of a stage, to the log and to the account of waits: that it began, ended or failed.

It knows events and the run's log, no node. Read next: ``crucible_kitchen.workflow.steps``.
"""

from crucible_kitchen.errors import CrucibleError
from crucible_kitchen.events import StageErrored, StageStart, StageStop
from crucible_kitchen.loop import EventLoop
from crucible_kitchen.redaction import redacted
from crucible_kitchen.workflow.failures import note, trace
from crucible_kitchen.workflow.run import RunContext

__all__ = ["Reports"]


class Reports:
    """The stage events of one run; ``began`` is always a time of the loop's clock, seconds."""

    def __init__(self, context: RunContext, loop: EventLoop) -> None:
        assert context.waits is not None, "a run under way has its account of waits"
        self._recipe = context.recipe
        self._emit = context.recorder.emit
        self._waits = context.waits
        self._now = loop.time

    def began(self, stage: str, path: str, attempt: int = 1) -> None:
        """Report that a try began."""
        self._waits.began(path)
        self._emit(StageStart(stage=stage, recipe=self._recipe, path=path, attempt=attempt))

    def ended(self, stage: str, path: str, began: float) -> None:
        """Report that it ended well."""
        taken = self._now() - began
        self._waits.ended(path)
        self._emit(StageStop(stage=stage, recipe=self._recipe, path=path, duration_s=taken))

    def errored(self, stage: str, path: str, error: CrucibleError, action: str, began: float, attempt: int = 1) -> None:
        """Report a failure; a log that fails now does not hide it, and stops the run at the next event."""
        event = StageErrored(
            stage=stage,
            recipe=self._recipe,
            path=path,
            attempt=attempt,
            code=error.code,
            message=redacted(error.message),
            action=action,
            duration_s=self._now() - began,
            traceback=trace(error),
        )
        self._waits.ended(path)
        try:
            self._emit(event)
        except Exception as unheard:  # noqa: BLE001 - the failure that is being reported comes first
            note(error, [unheard])
