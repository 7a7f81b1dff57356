"""A whole run beside an event loop: training, saving, sampling, exporting and registering never hold the loop up.

Three measurements of the same run, because a loaded machine may take the processor away from any thread:

- the CPU time of every callback of the loop, which no other process can lengthen;
- the time of every callback by the clock, which also sees a callback that waits for a file or a lock;
- the time between two turns of a ticker, which also sees another thread that keeps the interpreter for itself.

The first must hold every time. The others hold in the best of a few runs: what the code does, it does in each of them.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from crucible_kitchen.kitchen import Kitchen

pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

MOST_SECONDS = 0.05
TRIES = 4
RUN = {
    "model": "tiny",
    "dataset": "sums",
    "dataset_size": 2000,
    "batch_size": 64,
    "max_steps": 20,
    "save_every": 5,
    "eval_every": 10,
    "eval_size": 64,
    "eval_max_tokens": 8,
}


@dataclass
class Longest:
    """The longest seconds seen."""

    cpu: float = 0.0
    callback: float = 0.0
    turn: float = 0.0
    who: str = ""

    def note(self, cpu: float, clock: float, handle: asyncio.Handle) -> None:
        """Note a callback."""
        self.cpu = max(self.cpu, cpu)
        if clock > self.callback:
            self.callback, self.who = clock, repr(handle)

    def __str__(self) -> str:
        seconds = {"CPU of a callback": self.cpu, "callback": self.callback, "between two turns": self.turn}
        return ", ".join(f"{what} {value * 1000:.1f} ms" for what, value in seconds.items())


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Longest]:
    """Measure every callback of the event loop."""
    longest, original = Longest(), asyncio.Handle._run

    def measured(handle: asyncio.Handle) -> None:
        clock, cpu = time.perf_counter(), time.thread_time()
        original(handle)
        longest.note(time.thread_time() - cpu, time.perf_counter() - clock, handle)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", measured)
        yield longest


async def tick(longest: Longest) -> None:
    """Note the longest time between two turns; the millisecond that is asked for does not count."""
    last = time.perf_counter()
    while True:
        await anyio.sleep(0.001)
        now = time.perf_counter()
        longest.turn = max(longest.turn, now - last - 0.001)
        last = now


async def test_the_measurement_sees_a_callback_that_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as longest:
        async with anyio.create_task_group() as group:
            group.start_soon(tick, longest)
            await anyio.sleep(0.01)
            time.sleep(2 * MOST_SECONDS)  # noqa: ASYNC251 - what nothing in the product may do
            await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert longest.callback >= 2 * MOST_SECONDS > longest.cpu
    assert longest.turn > MOST_SECONDS


async def test_a_whole_run_never_holds_the_event_loop_up(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[Longest] = []
    async with Kitchen({"training_client": ("torch", {"threads": 1})}, home=home) as kitchen:
        await kitchen.run("supervised", RUN)  # imports torch and everything else that is imported once
        gc.collect()
        gc.freeze()  # a collection of all that was imported takes 100 ms: it is the interpreter's, not the run's
        while len(tries) < TRIES:
            with watched(monkeypatch) as longest:
                async with anyio.create_task_group() as group:
                    group.start_soon(tick, longest)
                    result = await kitchen.run("supervised", RUN)
                    group.cancel_scope.cancel()
            tries.append(longest)
            assert result.state.registered_model is not None
            if max(longest.callback, longest.turn) < MOST_SECONDS:
                break
    gc.unfreeze()
    with capsys.disabled():
        print("\nevent loop, longest:", *tries, sep="\n  ", file=sys.stderr)
    assert max(each.cpu for each in tries) < MOST_SECONDS
    assert min(each.callback for each in tries) < MOST_SECONDS, min(tries, key=lambda each: each.callback).who
    assert min(each.turn for each in tries) < MOST_SECONDS
