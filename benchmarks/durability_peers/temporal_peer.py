"""Temporal with its development server: local activities, one after the other. Costs only."""

import asyncio
import contextlib
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from _work import main
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

PORT = 17233


@activity.defn
async def nothing(step: int) -> int:
    return step


@workflow.defn
class Chain:
    @workflow.run
    async def run(self, steps: int) -> int:
        for step in range(steps):
            await workflow.execute_local_activity(nothing, step, start_to_close_timeout=timedelta(seconds=10))
        return steps


async def timed(steps: int) -> float:
    client = None
    while client is None:
        with contextlib.suppress(RuntimeError):
            client = await Client.connect(f"127.0.0.1:{PORT}")
    runner = UnsandboxedWorkflowRunner()
    async with Worker(client, task_queue="bench", workflows=[Chain], activities=[nothing], workflow_runner=runner):
        await client.execute_workflow(Chain.run, 10, id="warm", task_queue="bench")
        began = time.perf_counter()
        await client.execute_workflow(Chain.run, steps, id="chain", task_queue="bench")
        return time.perf_counter() - began


def cost(steps: int, directory: Path) -> list[tuple[str, float]]:
    binary = Path(sys.executable).parent / "temporal"
    command = [binary, "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(PORT)]
    options = ["--db-filename", str(directory / "temporal.db"), "--log-level", "never"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return [("development server on SQLite, local activities", asyncio.run(timed(steps)) / steps)]
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main(cost)
