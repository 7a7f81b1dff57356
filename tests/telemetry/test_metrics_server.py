"""The /metrics server, alone and scraped by the real Prometheus server."""

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
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


CONFIG = """
global:
  scrape_interval: 200ms
  scrape_timeout: 200ms
scrape_configs:
  - job_name: kitchen
    static_configs:
      - targets: ["127.0.0.1:{port}"]
"""


@asynccontextmanager
async def prometheus_scraping(port: int, directory: Path) -> AsyncIterator[str]:
    """Run the real Prometheus server against a metrics port; gives its address."""
    (directory / "prometheus.yml").write_text(CONFIG.format(port=port))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
    ]
    async with await anyio.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            with anyio.CancelScope(shield=True):
                await process.wait()


async def query_until_found(client: httpx.AsyncClient, query: str) -> Any:
    with anyio.fail_after(60):
        while True:
            try:
                answer = await client.get("/api/v1/query", params={"query": query})
                found = json.loads(answer.text)["data"]["result"] if answer.is_success else []
            except httpx.TransportError:  # it is still starting
                found = []
            if found:
                return found
            await anyio.sleep(0.1)


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="the Debian package prometheus is not installed")
async def test_the_real_prometheus_server_scrapes_and_answers(tmp_path: Path) -> None:
    sink = await fed_sink()
    server = await serve_metrics(sink.registry, 0)
    async with prometheus_scraping(server.port, tmp_path) as address, httpx.AsyncClient(base_url=address) as client:
        (loss,) = await query_until_found(client, "crucible_training_loss")
        assert loss["metric"]["workflow"] == "supervised"
        assert float(loss["value"][1]) == 0.125
        (mean,) = await query_until_found(client, "crucible_stage_seconds_sum / crucible_stage_seconds_count")
        assert mean["metric"]["stage"] == "train_step"
        assert float(mean["value"][1]) == pytest.approx(0.2)
        (runs,) = await query_until_found(client, 'crucible_runs_total{status="completed"}')
        assert float(runs["value"][1]) == 1
    await server.aclose()
