"""A sink that writes TensorBoard's event files, with TensorBoard's own writer and neither torch nor TensorFlow.

Needs the extra ``tensorboard``, imported when a run begins. Read next: ``crucible_kitchen.telemetry.sinks``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crucible_kitchen import events as e
from crucible_kitchen.errors import MissingExtra
from crucible_kitchen.events import EventRecord
from crucible_kitchen.telemetry.sinks import RunInfo
from crucible_kitchen.workers import Lane

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Writes scalars of training and evaluation, one directory per run, against the optimizer step.

    Args:
        log_dir: the directory that ``tensorboard --logdir`` is given.
    """

    name = "tensorboard"

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._lane = Lane("crucible-tensorboard")
        self._writers: dict[str, Any] = {}
        self._steps: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._closed = False

    async def open(self, run: RunInfo) -> None:
        """Begin the run's event file.

        Raises:
            MissingExtra: TensorBoard is not installed.
        """
        await self._lane.run(self._open, run.run_id)

    async def handle(self, records: Sequence[EventRecord]) -> None:
        """Write the records' scalars and flush."""
        await self._lane.run(self._write, records)

    async def aclose(self) -> None:
        """Close the files of runs that did not end."""
        if not self._closed:
            self._closed = True
            await self._lane.run(self._close_all)
            await self._lane.aclose()

    def _open(self, run_id: str) -> None:
        if run_id in self._writers:
            return
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "tensorboard") from error
        self._writers[run_id] = EventFileWriter(str(self._log_dir / run_id))

    def _write(self, records: Sequence[EventRecord]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        run_id = records[0].run_id
        writer = self._writers[run_id]
        for record in records:
            if record.seq <= self._seen.get(run_id, 0):
                continue
            step = getattr(record.event, "step", None)
            if step is not None:
                self._steps[run_id] = step
            found = scalars(record.event)
            if found:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in found.items()])
                writer.add_event(Event(wall_time=record.time, step=self._steps.get(run_id, 0), summary=summary))
            self._seen[run_id] = record.seq
        writer.flush()
        if records[-1].terminal:
            self._close(run_id)

    def _close(self, run_id: str) -> None:
        self._writers.pop(run_id).close()
        self._steps.pop(run_id, None)
        self._seen.pop(run_id, None)

    def _close_all(self) -> None:
        for run_id in list(self._writers):
            self._close(run_id)


_GROUPS: Mapping[type[e.Event], str] = {
    e.TrainingStep: "train",
    e.TrainingEpoch: "train",
    e.DpoStep: "dpo",
    e.DistillationStep: "distillation",
    e.RLStep: "rl",
    e.PipelineMeasured: "rl",
    e.EvalComplete: "eval",
    e.DpoEvaluated: "eval",
    e.PolicyEvaluated: "eval",
    e.WorkflowStop: "run",
}


def scalars(event: e.Event) -> Mapping[str, float]:
    """Return what TensorBoard plots of an event, by tag."""
    group = _GROUPS.get(type(event))
    return {} if group is None else {f"{group}/{name}": float(getattr(event, name)) for name in event.measurements}
