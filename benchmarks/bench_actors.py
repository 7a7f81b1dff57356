"""What an actor costs: an ask in event-loop turns beside a bare coroutine, a queue with a future and anyio's events.

A turn is one ``await asyncio.sleep(0)``; it is measured right before and after every measurement, so that a busy or
slow machine changes both alike. Each figure is the median of the repetitions' ratios, ``best`` the lowest of them.

    python benchmarks/bench_actors.py [--repetitions 40] [--messages 2000]
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
from _table import machine, print_table

from crucible_kitchen.actors import Actor, ActorRef, ChildSpec, Restarts, SupervisorSpec, supervise

Measure = Callable[[int], Awaitable[float]]
"""Sends that many messages and returns the seconds that one took."""


class Echo(Actor[int, int]):
    """Replies with the message."""

    async def handle(self, message: int) -> int:
        return message


async def turn(count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        await asyncio.sleep(0)
    return (time.perf_counter() - began) / count


async def bare(count: int) -> float:
    handle = Echo().handle
    began = time.perf_counter()
    for i in range(count):
        await handle(i)
    return (time.perf_counter() - began) / count


async def queue_and_future(count: int) -> float:
    """The least that can be written by hand: no cancellation, no restart, no statistics."""
    queue: asyncio.Queue[tuple[int, asyncio.Future[int]]] = asyncio.Queue(16)
    handle, loop = Echo().handle, asyncio.get_running_loop()

    async def serve() -> None:
        while True:
            message, future = await queue.get()
            future.set_result(await handle(message))

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        await asyncio.sleep(0)
        began = time.perf_counter()
        for i in range(count):
            future: asyncio.Future[int] = loop.create_future()
            await queue.put((i, future))
            await future
        taken = time.perf_counter() - began
        group.cancel_scope.cancel()
    return taken / count


async def stream_and_event(count: int) -> float:
    """The same with anyio's own parts."""
    send, receive = anyio.create_memory_object_stream[tuple[int, anyio.Event]](16)
    handle = Echo().handle

    async def serve() -> None:
        async for message, event in receive:
            await handle(message)
            event.set()

    async with anyio.create_task_group() as group, send, receive:
        group.start_soon(serve)
        await asyncio.sleep(0)
        began = time.perf_counter()
        for i in range(count):
            event = anyio.Event()
            await send.send((i, event))
            await event.wait()
        taken = time.perf_counter() - began
        group.cancel_scope.cancel()
    return taken / count


@asynccontextmanager
async def echo() -> AsyncIterator[ActorRef[int, int]]:
    spec = ChildSpec("echo", Echo)
    async with supervise(SupervisorSpec("bench", (spec,))) as tree:
        yield tree.ref(spec)


async def ask(count: int) -> float:
    async with echo() as ref:
        began = time.perf_counter()
        for i in range(count):
            await ref.ask(i)
        return (time.perf_counter() - began) / count


async def ask_many(count: int) -> float:
    """64 askers at a time, so that most of them wait for room."""
    async with echo() as ref:

        async def asker() -> None:
            for i in range(count // 64):
                await ref.ask(i)

        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(64):
                group.start_soon(asker)
        return (time.perf_counter() - began) / (count // 64 * 64)


async def tell(count: int) -> float:
    async with echo() as ref:
        began = time.perf_counter()
        for i in range(count):
            await ref.tell(i)
        await ref.ask(0)
        return (time.perf_counter() - began) / count


CASES: list[tuple[str, Measure, float | None]] = [
    ("bare coroutine", bare, None),
    ("`asyncio.Queue` and a future", queue_and_future, None),
    ("anyio memory stream and an event", stream_and_event, None),
    ("ask", ask, 3),
    ("ask, 64 askers, mailbox of 16", ask_many, 3),
    ("tell, mailbox of 16", tell, 3),
]


async def in_turns(measure: Measure, repetitions: int, messages: int) -> tuple[float, float, float]:
    """Return (median turns, fewest turns, median microseconds) of a message."""
    ratios, seconds = [], []
    await measure(messages)  # warm up
    for _ in range(repetitions):
        gc.collect()
        before = await turn(500)
        taken = await measure(messages)
        after = await turn(500)
        ratios.append(taken / ((before + after) / 2))
        seconds.append(taken)
    return statistics.median(ratios), min(ratios), statistics.median(seconds) * 1e6


async def dying(repetitions: int) -> None:
    """Measure an ask that its actor dies of, and that the next incarnation answers."""
    tries = 0

    class Flaky(Echo):
        async def handle(self, message: int) -> int:
            nonlocal tries
            tries += 1
            if tries % 2:
                raise RuntimeError
            return message

    spec = ChildSpec("flaky", Flaky)
    restarts = Restarts(most=repetitions, initial=0)
    taken = []
    async with supervise(SupervisorSpec("bench", (spec,), restarts=restarts)) as tree:
        for i in range(repetitions):
            began = time.perf_counter()
            await tree.ref(spec).ask(i)
            taken.append(time.perf_counter() - began)
    print_table(
        "An ask that kills its actor once", ["back-off", "median µs"], [["none", statistics.median(taken) * 1e6]]
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--messages", type=int, default=2000)
    args = parser.parse_args()
    rows: list[list[object]] = [["one event-loop turn", 1.0, 1.0, await turn(20_000) * 1e6, "", ""]]
    for name, measure, target in CASES:
        turns, best, micros = await in_turns(measure, args.repetitions, args.messages)
        verdict = "" if target is None else ("yes" if turns <= target else "NO")
        rows.append([name, turns, best, micros, "" if target is None else f"<= {target:g}", verdict])
    print_table(f"A message to an actor ({machine()})", ["how", "turns", "best", "µs", "target", "held"], rows)
    await dying(args.repetitions * 10)


if __name__ == "__main__":
    asyncio.run(main())
