"""The real Prometheus server scrapes a whole run while it runs, and answers questions about it."""

import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from crucible_kitchen.kitchen import Kitchen

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="the Debian package prometheus is not installed"),
]

SCRAPING = """
global:
  scrape_interval: 200ms
  scrape_timeout: 200ms
scrape_configs:
  - job_name: kitchen
    static_configs:
      - targets: ["127.0.0.1:{port}"]
"""
RUN = {
    "model": "tiny",
    "dataset": "sums",
    "max_steps": 40,
    "dataset_size": 640,
    "batch_size": 16,
    "save_every": 20,
    "eval_size": 20,
    "eval_max_tokens": 8,
}
ONE_THREAD = {"training_client": ("torch", {"threads": 1})}


@asynccontextmanager
async def prometheus_scraping(port: int, directory: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run the real Prometheus server against a metrics port; gives a client of its API."""
    (directory / "prometheus.yml").write_text(SCRAPING.format(port=port), encoding="utf-8")
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
            async with httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as client:
                yield client
        finally:
            process.terminate()
            with anyio.CancelScope(shield=True):
                await process.wait()


async def query_until_found(client: httpx.AsyncClient, query: str) -> dict[str, float]:
    """Ask until there is an answer; gives the values by the stage they are about, or by ``""``."""
    with anyio.fail_after(90):
        while True:
            try:
                answer = await client.get("/api/v1/query", params={"query": query})
                found = json.loads(answer.text)["data"]["result"] if answer.is_success else []
            except httpx.TransportError:  # it is still starting
                found = []
            if found:
                return {series["metric"].get("stage", ""): float(series["value"][1]) for series in found}
            await anyio.sleep(0.1)


async def test_prometheus_sees_a_run_while_it_runs_and_its_last_values_afterwards(home: Path, tmp_path: Path) -> None:
    async with Kitchen(ONE_THREAD, home=home, metrics_port=0) as kitchen:
        assert kitchen.metrics_port is not None
        async with prometheus_scraping(kitchen.metrics_port, tmp_path) as client:
            await query_until_found(client, 'up{job="kitchen"} == 1')
            run = await kitchen.start("supervised", RUN)
            at_work = await query_until_found(
                client, "crucible_training_steps_total < 40 and crucible_runs_active == 1"
            )
            result = await run.wait()
            await query_until_found(client, 'crucible_runs_total{status="completed"} == 1')
            await assert_the_last_values(client, result)
            assert 0 <= at_work[""] < RUN["max_steps"]
            (highest,) = (await query_until_found(client, "max_over_time(crucible_training_loss[10m])")).values()
            assert highest > result.metrics["training.step.loss"], "no scrape during the run saw an earlier loss"


async def assert_the_last_values(client: httpx.AsyncClient, result: Any) -> None:
    """Compare what Prometheus knows with what the run returned."""
    told = {
        "crucible_training_loss": result.metrics["training.step.loss"],
        "crucible_training_grad_norm": result.metrics["training.step.grad_norm"],
        "crucible_training_steps_total": RUN["max_steps"],
        "crucible_training_checkpoints_total": 2,
        "crucible_eval_accuracy": result.state.eval_results["accuracy"],
        "crucible_eval_samples": RUN["eval_size"],
        "crucible_models_registered_total": 1,
        "crucible_runs_active": 0,
    }
    for query, value in told.items():
        found = await query_until_found(client, f'{query}{{workflow="supervised"}}')
        assert found == {"": pytest.approx(value)}, query
    counts = await query_until_found(client, 'crucible_stage_seconds_count{workflow="supervised"}')
    assert counts["train_step"] == RUN["max_steps"]
    assert counts["save_checkpoint"] == 2
    assert counts["load_dataset"] == counts["evaluate"] == counts["register_model"] == 1
    seconds = await query_until_found(client, 'crucible_stage_seconds_sum{workflow="supervised"}')
    assert 0 < seconds["train_step"] < result.duration_s
