"""Submissions: nothing that was submitted outlives the block, however it is left."""

import asyncio

import anyio
import pytest

from crucible_kitchen.workers import Submissions

pytestmark = pytest.mark.anyio


class Hanging:
    """A call that hangs until it is cancelled."""

    def __init__(self) -> None:
        self.began, self.ended = anyio.Event(), anyio.Event()

    async def __call__(self) -> None:
        self.began.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.ended.set()


async def test_a_cancelled_block_ends_what_was_submitted() -> None:
    call = Hanging()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            async with Submissions() as calls:
                calls.submit(call)
                await call.began.wait()
                group.cancel_scope.cancel()
                await anyio.sleep_forever()
    assert call.ended.is_set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_block_that_asyncio_itself_cancels_ends_what_was_submitted() -> None:
    call = Hanging()

    async def cut_off() -> None:
        async with asyncio.timeout(None) as timeout, Submissions() as calls:
            calls.submit(call)
            await call.began.wait()
            timeout.reschedule(0)
            await anyio.sleep_forever()

    with anyio.fail_after(5), pytest.raises(TimeoutError):
        await cut_off()
    assert call.ended.is_set()


async def test_a_block_that_fails_ends_what_was_submitted_and_raises_its_own_error() -> None:
    call = Hanging()

    async def failing() -> None:
        async with Submissions() as calls:
            calls.submit(call)
            await call.began.wait()
            raise ValueError("its own")

    with anyio.fail_after(5), pytest.raises(ValueError, match="its own"):
        await failing()
    assert call.ended.is_set()


async def test_a_block_that_is_left_ends_what_was_submitted() -> None:
    call = Hanging()
    with anyio.fail_after(5):
        async with Submissions() as calls:
            calls.submit(call)
            await call.began.wait()
    assert call.ended.is_set()
