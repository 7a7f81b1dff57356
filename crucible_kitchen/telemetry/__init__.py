"""Telemetry: a run's event log, and the sinks that show it.

Sinks and the packages they need are imported on first use. Read next: ``crucible_kitchen.telemetry.bus``.
"""

from typing import TYPE_CHECKING

from crucible_kitchen.lazy import lazily
from crucible_kitchen.telemetry.bus import EventLog, Journal
from crucible_kitchen.telemetry.sinks import RunInfo, Sink, pump

if TYPE_CHECKING:
    from crucible_kitchen.telemetry.console import ConsoleSink
    from crucible_kitchen.telemetry.jsonl import JsonlSink
    from crucible_kitchen.telemetry.prometheus import MetricsServer, PrometheusSink, serve_metrics
    from crucible_kitchen.telemetry.tensorboard import TensorBoardSink

__all__ = [
    "ConsoleSink",
    "EventLog",
    "Journal",
    "JsonlSink",
    "MetricsServer",
    "PrometheusSink",
    "RunInfo",
    "Sink",
    "TensorBoardSink",
    "pump",
    "serve_metrics",
]

__getattr__ = lazily(
    __name__,
    {
        "console": ("ConsoleSink",),
        "jsonl": ("JsonlSink",),
        "prometheus": ("MetricsServer", "PrometheusSink", "serve_metrics"),
        "tensorboard": ("TensorBoardSink",),
    },
)
