"""The wire beside the process: one gradient, 64 samples at once, and what an idle wait costs.

Prints one table. The server runs in a process of its own on the loopback interface; both sides train the same tiny
model with the same threads. Every repetition runs both sides one after the other, in turns; a ratio is the median of
the repetitions' own.

    python benchmarks/bench_wire.py [--repetitions 9] [--threads 1] [--tokens 64] [--idle 5]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import numpy as np
from _table import machine, print_table

from crucible_kitchen.ports import Sampler, TrainingSession
from crucible_kitchen.types import Datum, SamplingParams, SessionSpec
from crucible_kitchen_http import HttpTrainingClient
from crucible_kitchen_http.endpoint import Endpoint
from crucible_kitchen_torch import TorchTrainingClient

Call = Callable[[], Awaitable[object]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--idle", type=float, default=5.0)
    return parser.parse_args()


def data() -> list[Datum]:
    """Return 32 rows of 128 tokens: 4k."""
    rng = np.random.default_rng(0)
    return [Datum.from_tokens(rng.integers(0, 256, 129), np.ones(129), f"row-{i}") for i in range(32)]


@asynccontextmanager
async def server(threads: int) -> AsyncIterator[str]:
    """Run a server in a process of its own."""
    with tempfile.TemporaryDirectory() as home:
        backend = f"training_client=torch,threads={threads},verify_invariance=off"
        command = [sys.executable, "-m", "crucible_kitchen", "train-server", "--json", "--port", "0", "--home", home]
        process = subprocess.Popen([*command, "--adapter", backend], stdout=subprocess.PIPE)  # noqa: ASYNC220
        assert process.stdout is not None
        try:
            yield json.loads(await anyio.to_thread.run_sync(process.stdout.readline))["url"]
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def gradient(session: TrainingSession, datums: list[Datum]) -> Call:
    async def run() -> None:
        async with session.step(0) as step:
            await (await step.forward_backward(datums))

    return run


def samples(sampler: Sampler, tokens: int, *, at_once: bool) -> Call:
    async def one(seed: int) -> None:
        await sampler.sample([49, 43, 50, 61], SamplingParams(max_tokens=tokens, seed=seed))

    async def run() -> None:
        if not at_once:
            for seed in range(64):
                await one(seed)
            return
        async with anyio.create_task_group() as group:
            for seed in range(64):
                group.start_soon(one, seed)

    return run


async def took(call: Call) -> float:
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


async def compare(name: str, wire: Call, other: Call, repetitions: int) -> tuple[object, ...]:
    """Time both in turns, the first once more to warm up."""
    await wire()
    await other()
    pairs = []
    for i in range(repetitions):
        calls = (wire, other) if i % 2 else (other, wire)
        times = [await took(call) for call in calls]
        pairs.append(times if i % 2 else times[::-1])
    ours, theirs = (statistics.median(p[side] for p in pairs) for side in (0, 1))
    return name, ours, theirs, statistics.median(a / b for a, b in pairs), statistics.median(b / a for a, b in pairs)


async def idle_requests(endpoint: Endpoint, seconds: float) -> int:
    """Count the requests of a client that waits for a result which does not come."""
    opened = await endpoint.post("create_session", {})
    body = {"session_id": opened["session_id"], "model_seq_id": 0, "base_model": "tiny"}
    model = (await endpoint.result((await endpoint.post("create_model", body))["request_id"]))["model_id"]
    late = {"model_id": model, "seq_id": 2, "adam_params": {}}  # 1 never comes
    taken = await endpoint.post("optim_step", late)
    count = 0
    fetch = endpoint._fetch

    async def counted(*args: object) -> bytes:
        nonlocal count
        count += 1
        return await fetch(*args)  # type: ignore[arg-type]

    endpoint._fetch = counted  # type: ignore[method-assign]
    with anyio.move_on_after(seconds):
        await endpoint.result(taken["request_id"])
    return count


async def main() -> None:
    args = options()
    spec = SessionSpec("tiny", None, 0, tempfile.gettempdir())
    local_client = TorchTrainingClient(threads=args.threads, verify_invariance="off")
    datums = data()
    async with server(args.threads) as url:
        client = HttpTrainingClient(base_url=url)
        async with client.open_session(spec) as remote, local_client.open_session(spec) as local:
            ours, theirs = await remote.sampler(), await local.sampler()
            together = samples(ours, args.tokens, at_once=True)
            rows = [
                await compare(
                    "forward_backward, 4k tokens", gradient(remote, datums), gradient(local, datums), args.repetitions
                ),
                await compare(
                    "64 samples at once", together, samples(theirs, args.tokens, at_once=True), args.repetitions
                ),
                await compare(
                    "64 at once beside one by one",
                    together,
                    samples(ours, args.tokens, at_once=False),
                    max(args.repetitions // 3, 1),
                ),
            ]
        asked = await idle_requests(client._endpoint, args.idle)
        await client.aclose()
    head = ("case", "wire, s", "other, s", "wire's time / other's", "wire's rate / other's")
    print_table(f"The wire beside the process, {args.threads} threads of {machine()}", head, rows)
    print(f"A client that waits {args.idle:g} s for a result sends {asked} request(s).")


if __name__ == "__main__":
    anyio.run(main)
