"""The /metrics server; the real Prometheus server scrapes one in tests/e2e/test_prometheus.py."""

import socket
import threading

import httpx
import pytest

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.events import EventRecord, StageStop, TrainingStep, WorkflowStop
from crucible_kitchen.telemetry import PrometheusSink, RunInfo, serve_metrics

pytestmark = pytest.mark.anyio


async def fed_sink() -> PrometheusSink:
    sink = PrometheusSink()
    await sink.open(RunInfo("r", "supervised"))
    step = TrainingStep(step=7, epoch=0, loss=0.125, lr=0.01, tokens_per_sec=10.0, grad_norm=1.0)
    stage = StageStop(stage="train_step", recipe="supervised", path="p", duration_s=0.2)
    stop = WorkflowStop(recipe="supervised", status="completed", duration_s=1.0)
    await sink.handle([EventRecord("r", i, 0.0, event) for i, event in enumerate((step, stage, stop), 1)])
    return sink


async def test_metrics_are_served_and_closing_leaves_no_thread_and_no_port() -> None:
    sink = await fed_sink()
    server = await serve_metrics(sink.registry, 0)
    async with httpx.AsyncClient() as client:
        answer = await client.get(server.url)
    assert answer.status_code == 200
    assert 'crucible_training_loss{workflow="supervised"} 0.125' in answer.text
    await server.aclose()
    await server.aclose()
    assert not any(thread.name == "crucible-metrics" for thread in threading.enumerate())
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port))


async def test_two_kitchens_do_not_mix_their_metrics() -> None:
    one, two = await fed_sink(), PrometheusSink()
    labels = {"workflow": "supervised"}
    assert one.registry.get_sample_value("crucible_training_steps_total", labels) == 1
    assert two.registry.get_sample_value("crucible_training_steps_total", labels) is None


async def test_a_port_that_is_taken_is_a_config_error() -> None:
    server = await serve_metrics(PrometheusSink().registry, 0)
    with pytest.raises(ConfigError) as caught:
        await serve_metrics(PrometheusSink().registry, server.port)
    assert caught.value.hint is not None
    await server.aclose()
