"""Cancelling reaches every adapter: one that waits, one that computes, one that will not hear of it, a thousand."""

import contextlib
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen import Kitchen, Parallel, Workflow, stage
from crucible_kitchen.errors import RunCancelled
from crucible_kitchen.ports import LLMClient
from crucible_kitchen.testing.faults import hangs, with_faults
from crucible_kitchen.types import Message
from crucible_kitchen.workers import run_sync
from crucible_kitchen_noop import NoopLLMClient

pytestmark = pytest.mark.anyio

QUESTION = [Message("user", "?")]


class Adapter(NoopLLMClient):
    """Does what it is told in ``chat``, and counts who went in and came out."""

    def __init__(self, body: Callable[[], Awaitable[Any]]) -> None:
        super().__init__()
        self.body = body
        self.inside = 0
        self.entered = 0
        self.closed = False

    async def chat(self, *arguments: Any, **options: Any) -> Any:
        self.inside += 1
        self.entered += 1
        try:
            await self.body()
        finally:
            self.inside -= 1
        return await super().chat(*arguments, **options)

    async def aclose(self) -> None:
        self.closed = True
        await super().aclose()


@stage()
async def ask(llm_client: LLMClient) -> None:
    await llm_client.chat(QUESTION)


@stage()
async def never(llm_client: LLMClient) -> None:
    raise AssertionError("a stage ran after the cancellation")


async def cancelled(kitchen: Kitchen, workflow: Workflow, adapter: Any, inside: Callable[[], bool]) -> str:
    """Start a run, cancel it once its calls are under way, and return how the store says that it ended."""
    async with kitchen:
        run = await kitchen.start(workflow, adapters={"llm_client": adapter})
        with anyio.fail_after(30):
            while not inside():
                await anyio.lowlevel.checkpoint()
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.wait()
        return (await kitchen.store.run(run.id)).status


async def test_an_adapter_that_waits_is_ended(home: Path) -> None:
    adapter = Adapter(anyio.sleep_forever)
    ended = await cancelled(Kitchen(home=home), Workflow("w", ask, never), adapter, lambda: adapter.inside == 1)
    assert (ended, adapter.inside) == ("cancelled", 0)


async def test_a_thousand_calls_that_wait_are_all_ended(home: Path) -> None:
    adapter = Adapter(anyio.sleep_forever)
    branches = [ask.with_(name=f"ask{i}") for i in range(1000)]
    ended = await cancelled(
        Kitchen(home=home), Workflow("w", Parallel(*branches), never), adapter, lambda: adapter.inside == 1000
    )
    assert (ended, adapter.inside, adapter.entered) == ("cancelled", 0, 1000)


async def test_an_adapter_that_computes_in_a_thread_is_waited_for_so_that_nothing_runs_on(home: Path) -> None:
    computing, released, through = threading.Event(), threading.Event(), threading.Event()

    def compute() -> None:
        computing.set()
        released.wait()
        through.set()

    adapter = Adapter(lambda: run_sync(compute))

    def inside() -> bool:
        if computing.is_set():
            released.set()
        return computing.is_set()

    ended = await cancelled(Kitchen(home=home), Workflow("w", ask, never), adapter, inside)
    assert (ended, adapter.inside) == ("cancelled", 0)
    assert through.is_set(), "the run ended while its thread still computed"


@pytest.mark.parametrize("times", [1, 3])
async def test_an_adapter_that_swallows_its_cancellation_does_not_escape_it(home: Path, times: int) -> None:
    swallowed = []

    async def stubborn() -> None:
        for _ in range(times):
            with contextlib.suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()
            swallowed.append(1)

    adapter = Adapter(stubborn)
    ended = await cancelled(Kitchen(home=home), Workflow("w", ask, never), adapter, lambda: adapter.inside == 1)
    assert (ended, adapter.inside, len(swallowed)) == ("cancelled", 0, times)


async def test_a_call_that_a_fault_made_hang_is_ended(home: Path) -> None:
    entered = []

    class Counted(NoopLLMClient):
        async def chat(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("the fault strikes before the call")

    @stage()
    async def hang(llm_client: LLMClient) -> None:
        entered.append(1)
        await llm_client.chat(QUESTION)

    adapter = with_faults(Counted(), hangs("chat"))
    ended = await cancelled(Kitchen(home=home), Workflow("w", hang, never), adapter, lambda: bool(entered))
    assert ended == "cancelled"


async def test_an_adapter_of_the_run_is_closed_after_its_calls_have_ended(home: Path) -> None:
    order: list[str] = []

    async def slow_to_leave() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            order.append("call")

    adapter = Adapter(slow_to_leave)

    @stage()
    async def held(llm_client: LLMClient) -> Any:
        await llm_client.chat(QUESTION)

    ended = await cancelled(Kitchen(home=home), Workflow("w", held), adapter, lambda: adapter.inside == 1)
    order.append("run over")
    assert (ended, order) == ("cancelled", ["call", "run over"])
