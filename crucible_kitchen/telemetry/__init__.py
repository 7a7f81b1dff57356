"""Telemetry: a run's event log, and the sinks that show it.

Sinks and the packages they need are imported on first use. Read next: ``crucible_kitchen.telemetry.bus``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_HOMES = {
    "ConsoleSink": "console",
    "JsonlSink": "jsonl",
    "MetricsServer": "prometheus",
    "PrometheusSink": "prometheus",
    "TensorBoardSink": "tensorboard",
    "serve_metrics": "prometheus",
}


def __getattr__(name: str) -> Any:
    """Import a sink's module when the sink is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
