"""A store that breaks or dies at its n-th write, for every n: what came before is there, and nothing else."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest

from crucible_kitchen.errors import StorageFull, StoreError
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import Checkpoint, RunRecord, RunStore, StageRecord
from crucible_kitchen.testing.stores import FaultyStore, dead_owner
from crucible_kitchen.types import BlobRef

pytestmark = pytest.mark.anyio

WRITES = 10


@pytest.fixture(params=["sqlite-asyncio", "memory-asyncio"])
def kind(request: Any) -> str:
    return str(request.param)


async def live(store: RunStore) -> None:
    """A run's life, in ten writes."""
    await store.create_run(RunRecord("r", "w"), manifest={"seed": 1})
    for step in (1, 2):
        for seq in (2 * step - 1, 2 * step):
            store.append([EventRecord("r", seq, 0.0, WarningRaised(code="c", message=str(seq)))])
        store.record(StageRecord("r", f"w/s{step}", "in", "out", step, 2 * step))
        await store.flush("r", 2 * step)
        assert store.durable("r") == 2 * step
    await store.put_checkpoint(Checkpoint("r", 1, "w/s", "w/s2", 2, 1, 4, 0.0))
    await store.put_artifact("r", BlobRef("blob://sha256/aa", "aa", 1, "weights", "final"))
    await store.finish_run("r", "completed", {})


async def kept(store: RunStore) -> list[str]:
    """What a store has of it, in the order of the writes."""
    if not await store.runs():
        return []
    run = await store.run("r")
    assert await store.manifest("r") == {"seed": 1}, "a run without a manifest cannot be resumed"
    found = ["run"]
    events = await store.read("r", 0, 10)
    stages = await store.records("r")
    assert [record.seq for record in events] == list(range(1, len(events) + 1))
    for step in (1, 2):
        found += ["event"] * len(events[2 * step - 2 : 2 * step]) + ["stage"] * len(stages[step - 1 : step])
    found += ["checkpoint"] * len(await store.checkpoints("r")) + ["artifact"] * len(await store.artifacts("r"))
    return found + ["end"] * (run.status == "completed")


ALL = ["run", *["event", "event", "stage"] * 2, "checkpoint", "artifact", "end"]


@pytest.mark.parametrize("error", [None, StoreError("the disk broke"), StorageFull("the disk is full")])
@pytest.mark.parametrize("n", range(1, WRITES + 2))
async def test_what_was_written_before_the_nth_write_is_there_and_nothing_after_it(
    make: Callable[[], RunStore], n: int, error: StoreError | None
) -> None:
    async with FaultyStore(make(), at=n, error=error) as store:
        with nullcontext() if error is None else suppress(type(error)):
            await live(store)
        assert store.struck is (n <= WRITES)
        assert store.writes == (min(n, WRITES) if error else WRITES)
    async with make() as after:
        assert await kept(after) == ALL[: n - 1]
        if 1 < n <= WRITES:
            assert (await after.open_attempt("r")).epoch == 2


async def test_a_store_that_broke_refuses_everything_afterwards(make: Callable[[], RunStore]) -> None:
    async with FaultyStore(make(), at=3, error=StorageFull("full")) as store:
        with pytest.raises(StorageFull):
            await live(store)
        for write in (
            store.drain(),
            store.flush("r", 0),
            store.finish_run("r", "failed", {}),
            store.durable_after("r", 0),
        ):
            with pytest.raises(StorageFull):
                await write
        assert (await store.run("r")).status == "running"


async def test_a_dead_process_believes_that_it_goes_on(make: Callable[[], RunStore]) -> None:
    async with make() as before:
        await before.create_run(RunRecord("r", "w"), dead_owner())
        before.append([EventRecord("r", 1, 0.0, WarningRaised(code="c", message="m"))])
    async with FaultyStore(make(), at=1) as store:
        lease = await store.open_attempt("r")
        assert (lease.epoch, lease.seq) == (2, 1)
        store.append([EventRecord("r", 2, 0.0, WarningRaised(code="c", message="m"))])
        await store.flush("r", 2)
        assert (store.durable("r"), await store.durable_after("r", 1)) == (2, 2)
        assert await store.renew(lease) == lease
        assert await store.reconcile() == []
        await store.drain()
    async with make() as after:
        assert len(await after.attempts("r")) == 1
        assert len(await after.read("r", 0, 9)) == 1
