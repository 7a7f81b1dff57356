"""Attempts, leases and fencing, held against both stores; two stores over the same runs are two processes."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen.errors import Conflict, LeaseLost, RunEnded, RunLive, RunNotFound, StoreError
from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import Checkpoint, Lease, Owner, RunRecord, RunStore, StageRecord
from crucible_kitchen.types import BlobRef

pytestmark = pytest.mark.anyio

ELSEWHERE = Owner("another-host", "b", "n", 7, 1)
DEAD = replace(Owner.here(), born=1)  # a process of this number lives, but it began at another time
ARTIFACT = BlobRef("blob://sha256/bb", "bb", 2, "report", "eval")


@pytest.fixture(params=["sqlite-asyncio", "sqlite-trio", "memory-asyncio", "memory-trio-virtual-time"])
def kind(request: Any) -> str:
    return str(request.param)


@pytest.fixture
async def pair(make: Callable[[], RunStore]) -> AsyncIterator[tuple[RunStore, RunStore]]:
    async with make() as one, make() as two:
        yield one, two


def event(seq: int, run_id: str = "r") -> EventRecord:
    return EventRecord(run_id, seq, 1.5, WarningRaised(code="c", message=str(seq)))


def output(path: str, seq: int, value: object = None, run_id: str = "r") -> StageRecord:
    return StageRecord(run_id, path, "in", "out", value, seq)


def checkpoint(number: int, epoch: int = 1, **more: Any) -> Checkpoint:
    return Checkpoint("r", number, more.pop("session", "w/s"), "w/s/e[0]", number, epoch, 0, 1.25, **more)


async def test_a_new_run_is_the_first_attempt_of_this_process(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    lease = await store.create_run(RunRecord("r", "w"), ttl=10.0)
    assert lease == Lease("r", 1, 109.5, 0)
    (attempt,) = await other.attempts("r")
    assert (attempt.number, attempt.owner, attempt.started_at) == (1, Owner.here(), 99.5)
    assert (attempt.status, attempt.ended_at, attempt.error) == ("running", None, None)
    assert await store.attempts("nobody") == []


async def test_a_run_with_a_living_owner_is_refused_by_name(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"))
    for one in pair:
        with pytest.raises(RunLive) as caught:
            await one.open_attempt("r")
        here = Owner.here()
        assert all(word in caught.value.message for word in (str(here.pid), here.host, "1970-01-01 00:01:39"))
    store.append([event(1)])
    await store.flush("r", 1)
    assert len(await other.attempts("r")) == 1


async def test_a_lease_that_was_renewed_keeps_others_off_and_one_that_ended_does_not(
    pair: tuple[RunStore, RunStore], clock: Any
) -> None:
    store, other = pair
    lease = await store.create_run(RunRecord("r", "w"), ELSEWHERE, ttl=10.0)
    clock.now += 9.0
    lease = await store.renew(lease, ttl=10.0)
    assert lease.until == 118.5
    clock.now += 9.0
    with pytest.raises(RunLive):
        await other.open_attempt("r")
    clock.now += 1.0
    assert (await other.open_attempt("r")).epoch == 2


async def test_a_dead_owner_loses_its_run_before_the_lease_ends(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"), DEAD)
    store.append([event(1), event(2)])
    await store.flush("r", 2)
    assert await other.open_attempt("r") == Lease("r", 2, 129.5, 2)
    first, second = await other.attempts("r")
    assert (first.status, first.ended_at, first.seq) == ("crashed", 99.5, 0)
    assert (second.status, second.seq) == ("running", 2)


async def test_the_log_goes_on_where_it_ended(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"), DEAD)
    store.append([event(1), event(2)])
    await store.flush("r", 2)
    await other.open_attempt("r")
    assert other.durable("r") == 2
    with pytest.raises(StoreError, match="does not follow"):
        other.append([event(2)])
    other.append([event(3)])
    await other.flush("r", 3)
    assert [r.seq for r in await store.read("r", 0, 9)] == [1, 2, 3]


async def _appended(store: RunStore) -> None:
    seq = store.durable("r") + 1
    store.append([event(seq)])
    await store.flush("r", seq)


async def _recorded(store: RunStore) -> None:
    store.record(output("w/a", 0))
    await store.flush("r", 0)


Forbidden = Callable[[RunStore], Any]


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.finish_run("r", "completed", {}),
        lambda store: store.put_checkpoint(checkpoint(1)),
        lambda store: store.drop_checkpoint("r", 9),
        lambda store: store.put_artifact("r", ARTIFACT),
        lambda store: store.renew(Lease("r", 1, 0.0, 0)),
        _appended,
        _recorded,
    ],
    ids=["finish", "put_checkpoint", "drop_checkpoint", "artifact", "renew", "append", "record"],
)
async def test_nothing_of_an_attempt_that_was_taken_over_is_written(
    pair: tuple[RunStore, RunStore], write: Forbidden
) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"), DEAD, manifest={"seed": 1})
    await other.open_attempt("r")
    await other.put_checkpoint(checkpoint(9, epoch=2))
    with pytest.raises(LeaseLost):
        await write(store)
    for later in (_appended, _recorded, lambda store: store.put_artifact("r", ARTIFACT)):
        with pytest.raises(LeaseLost):
            await later(store)
    assert (await other.run("r")).status == "running"
    assert await other.manifest("r") == {"seed": 1}
    assert [c.number for c in await other.checkpoints("r")] == [9]
    assert (await other.read("r", 0, 9), await other.records("r"), await other.artifacts("r")) == ([], [], [])
    other.append([event(1)])
    await other.flush("r", 1)
    await other.finish_run("r", "completed", {})


async def test_a_stale_attempt_does_not_touch_the_other_runs_of_its_process(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    for run_id in ("a", "r", "z"):
        await store.create_run(RunRecord(run_id, "w"), DEAD)
    await other.open_attempt("r")
    for seq in range(1, 101):
        for run_id in ("a", "r", "z"):
            with _allowed(LeaseLost if run_id == "r" else None):
                store.append([event(seq, run_id)])
                store.record(output(f"w/{seq}", seq, run_id=run_id))
    for run_id in ("a", "z"):
        await store.flush(run_id, 100)
        assert len(await store.read(run_id, 0, 1000)) == 100
        assert len(await store.records(run_id)) == 100
        await store.finish_run(run_id, "completed", {})
    with pytest.raises(LeaseLost):
        await store.finish_run("r", "completed", {})
    assert store.pending == 0
    assert await other.read("r", 0, 9) == []
    assert await other.records("r") == []


class _allowed:
    def __init__(self, error: type[Exception] | None) -> None:
        self.error = error

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and self.error is not None and issubclass(kind, self.error)


async def test_whoever_waits_for_a_record_learns_that_the_run_was_lost(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"), DEAD)
    lost: list[str] = []

    async def wait() -> None:
        with pytest.raises(LeaseLost):
            await store.durable_after("r", 0)
        lost.append("learnt")

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await other.open_attempt("r")
        store.append([event(1)])
    assert lost == ["learnt"]


@pytest.mark.parametrize("status", ["failed", "cancelled", "paused", "crashed"])
async def test_a_run_that_ended_short_can_be_opened_again(pair: tuple[RunStore, RunStore], status: Any) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"))
    store.append([event(1)])
    await store.finish_run("r", status, {"metrics": {}}, {"code": "x", "message": "y"})
    assert (await other.open_attempt("r")).epoch == 2
    run = await store.run("r")
    assert (run.status, run.finished_at, run.result, run.error) == ("running", None, None, None)
    first, second = await store.attempts("r")
    assert (first.status, first.error, first.ended_at) == (status, {"code": "x", "message": "y"}, 99.5)
    assert second.status == "running"
    await other.finish_run("r", "completed", {"a": 1})
    assert [a.status for a in await store.attempts("r")] == [status, "completed"]
    assert (await store.run("r")).result == {"a": 1}


async def test_an_unknown_or_a_completed_run_cannot_be_opened_again(pair: tuple[RunStore, RunStore]) -> None:
    store, _ = pair
    with pytest.raises(RunNotFound):
        await store.open_attempt("nobody")
    await store.create_run(RunRecord("r", "w"))
    await store.finish_run("r", "completed", {})
    with pytest.raises(RunEnded):
        await store.open_attempt("r")


async def test_nothing_is_written_after_the_end(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    lease = await store.create_run(RunRecord("r", "w"))
    store.append([event(1)])
    await store.finish_run("r", "paused", {})
    await store.flush("r", 1)
    with pytest.raises(RunEnded):
        store.append([event(2)])
    with pytest.raises(RunEnded):
        store.record(output("w/a", 1))
    for one in pair:
        for write in (
            lambda s: s.finish_run("r", "failed", {}),
            lambda s: s.put_artifact("r", ARTIFACT),
        ):
            with pytest.raises(RunEnded):
                await write(one)
    with pytest.raises(LeaseLost):
        await other.put_checkpoint(checkpoint(1))
    with pytest.raises(LeaseLost):
        await store.renew(lease)
    assert (await other.run("r")).status == "paused"


async def test_runs_without_an_owner_are_found_once(pair: tuple[RunStore, RunStore], clock: Any) -> None:
    store, other = pair
    for run_id, owner, ttl in (("dead", DEAD, 30.0), ("mute", ELSEWHERE, 5.0), ("far", ELSEWHERE, 30.0)):
        await store.create_run(RunRecord(run_id, "w"), owner, ttl)
    await store.create_run(RunRecord("here", "w"))
    await store.create_run(RunRecord("done", "w"), DEAD)
    await store.finish_run("done", "completed", {})
    clock.now += 6.0
    found: list[RunRecord] = []

    async def look(one: RunStore) -> None:
        found.extend(await one.reconcile())

    async with anyio.create_task_group() as group:
        for one in (*pair, *pair):
            group.start_soon(look, one)
    assert sorted(run.run_id for run in found) == ["dead", "mute"]
    assert {(run.status, run.finished_at) for run in found} == {("crashed", 105.5)}
    assert {r.run_id for r in await other.runs(status="running")} == {"far", "here"}
    assert [a.status for a in await other.attempts("dead")] == ["crashed"]
    with pytest.raises(LeaseLost):
        await store.finish_run("mute", "completed", {})


async def test_a_living_owner_that_was_late_is_no_orphan_but_can_be_taken_over(
    pair: tuple[RunStore, RunStore], clock: Any
) -> None:
    store, other = pair
    lease = await store.create_run(RunRecord("r", "w"))
    clock.now += 1000.0  # the machine slept
    assert await other.reconcile() == []
    lease = await store.renew(lease)
    with pytest.raises(RunLive):
        await other.open_attempt("r")
    clock.now += 1000.0
    assert (await other.open_attempt("r")).epoch == 2
    with pytest.raises(LeaseLost):
        await store.renew(lease)


async def test_what_a_closed_store_still_had_is_free_at_once(make: Callable[[], RunStore]) -> None:
    async with make() as store, make() as other:
        await store.create_run(RunRecord("r", "w"))
        await other.create_run(RunRecord("mine", "w"))
        await store.aclose()
        assert [run.run_id for run in await other.reconcile()] == ["r"]
        assert (await other.open_attempt("r")).epoch == 2


async def test_a_clock_that_goes_back_shortens_no_lease(pair: tuple[RunStore, RunStore], clock: Any) -> None:
    store, other = pair
    lease = await store.create_run(RunRecord("r", "w"), ELSEWHERE, ttl=30.0)
    clock.now -= 3600.0
    assert (await store.renew(lease)).until == lease.until
    with pytest.raises(RunLive):
        await other.open_attempt("r")
    store.append([event(1)])
    await store.flush("r", 1)
    await store.finish_run("r", "completed", {})
    assert (await other.run("r")).finished_at == 99.5 - 3600.0


async def test_a_clock_that_jumps_ahead_costs_the_attempt_and_no_record(
    pair: tuple[RunStore, RunStore], clock: Any
) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"))
    store.append([event(1)])
    await store.flush("r", 1)
    clock.now += 1e9
    assert (await other.open_attempt("r")).seq == 1
    with pytest.raises(LeaseLost):
        await _appended(store)
    assert [r.seq for r in await other.read("r", 0, 9)] == [1]


async def test_an_attempt_that_nobody_took_over_goes_on_after_its_lease_ended(
    pair: tuple[RunStore, RunStore], clock: Any
) -> None:
    store, other = pair
    lease = await store.create_run(RunRecord("r", "w"), ELSEWHERE, ttl=1.0)
    clock.now += 100.0
    store.append([event(1)])
    await store.flush("r", 1)
    await store.renew(lease)
    with pytest.raises(RunLive):
        await other.open_attempt("r")


async def test_stages_records_are_kept_newest_by_path_in_order(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"))
    odd = {"nan": float("nan"), "tuple": (1, 2), "half": "a\ud800b", "none": None}
    store.append([event(1), event(2), event(3)])
    for record in (output("w/b", 1, {"x": 1}), output("w/a", 2), output("w/b", 3, odd), output("w/c", 2, [1.5, "s"])):
        store.record(record)
    await store.flush("r", 3)
    kept = await other.records("r")
    assert [(r.path, r.seq) for r in kept] == [("w/a", 2), ("w/c", 2), ("w/b", 3)]
    assert (kept[0].value, kept[1].value) == (None, [1.5, "s"])
    assert (kept[2].value["tuple"], kept[2].value["half"]) == ([1, 2], "a\ud800b")
    assert (kept[2].run_id, kept[2].input_hash, kept[2].output_hash) == ("r", "in", "out")
    assert await other.records("nobody") == []


async def test_a_flush_covers_the_stages_records_before_it(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"))
    for seq in range(1, 200):
        store.append([event(seq)])
        await store.flush("r", seq)
        store.record(output(f"w/{seq}", seq))
        await store.flush("r", seq)
        assert len(await other.records("r")) == seq
    assert store.pending == 0


async def test_a_stages_record_needs_an_open_run(pair: tuple[RunStore, RunStore]) -> None:
    with pytest.raises(RunNotFound):
        pair[0].record(output("w/a", 0))


async def test_checkpoints_come_back_newest_first_as_they_were_written(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"))
    first = checkpoint(1, data={"state": {"x": (1, 2)}, "nan": float("inf")}, states={"resume": "file:a"})
    await store.put_checkpoint(first)
    await store.put_checkpoint(checkpoint(2, session="w/other"))
    await store.put_checkpoint(checkpoint(3, states={"w/s": {"uri": "file:3"}}))
    assert [c.number for c in await other.checkpoints("r")] == [3, 2, 1]
    found = (await other.checkpoints("r", session="w/s"))[-1]
    assert found == replace(first, data={"state": {"x": [1, 2]}, "nan": float("inf")}, sha256=found.digest())
    found.verify()
    with pytest.raises(Conflict):
        await store.put_checkpoint(checkpoint(3))
    await store.drop_checkpoint("r", 2)
    await store.drop_checkpoint("r", 2)
    assert [c.number for c in await other.checkpoints("r")] == [3, 1]
    file, old = BlobRef("file:a", "aa", 1, "checkpoint", "step-1"), BlobRef("file:3", "cc", 1, "checkpoint", "step-3")
    for artifact in (ARTIFACT, file, old):
        await store.put_artifact("r", artifact)
    await store.finish_run("r", "completed", {})
    await other.drop_checkpoint("r", 3)
    assert await other.artifacts("r") == [ARTIFACT, file]
    assert [c.number for c in await other.checkpoints("r")] == [1]
    with pytest.raises(RunNotFound):
        await store.drop_checkpoint("nobody", 1)
    with pytest.raises(RunNotFound):
        await store.put_checkpoint(replace(first, run_id="nobody"))


async def test_a_checkpoint_is_written_by_the_epoch_it_says(pair: tuple[RunStore, RunStore]) -> None:
    store, _ = pair
    await store.create_run(RunRecord("r", "w"))
    with pytest.raises(LeaseLost):
        await store.put_checkpoint(checkpoint(1, epoch=2))
    await store.put_checkpoint(checkpoint(1))


async def test_deleting_a_run_leaves_nothing_of_it(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    for run_id in ("r", "kept"):
        await store.create_run(RunRecord(run_id, "w"), manifest={"seed": 1})
        store.append([event(1, run_id)])
        store.record(output("w/a", 1, run_id=run_id))
        await store.put_checkpoint(replace(checkpoint(1), run_id=run_id))
        await store.put_artifact(run_id, ARTIFACT)
    with pytest.raises(RunLive):
        await other.delete_run("r")
    for run_id in ("r", "kept"):
        await store.finish_run(run_id, "failed", {})
    await other.delete_run("r")
    with pytest.raises(RunNotFound):
        await other.run("r")
    with pytest.raises(RunNotFound):
        await other.delete_run("r")
    left = [await read("r") for read in (other.attempts, other.records, other.checkpoints, other.artifacts)]
    assert [*left, await other.manifest("r"), await other.read("r", 0, 9)] == [[], [], [], [], None, []]
    assert len(await other.read("kept", 0, 9)) == len(await other.records("kept")) == 1
    assert (await other.create_run(RunRecord("r", "w"))).seq == 0


async def test_an_orphan_can_be_deleted(pair: tuple[RunStore, RunStore]) -> None:
    store, other = pair
    await store.create_run(RunRecord("r", "w"), DEAD)
    await other.delete_run("r")
    with pytest.raises(LeaseLost):
        await _appended(store)
    assert await other.read("r", 0, 9) == []


async def test_runs_are_filtered_by_age(pair: tuple[RunStore, RunStore]) -> None:
    store, _ = pair
    for i in range(60):
        await store.create_run(RunRecord(f"r{i:02}", "w", created_at=float(i)))
    assert len(await store.runs()) == 50
    assert len(await store.runs(limit=None)) == 60
    assert [r.run_id for r in await store.runs(since=10.0, before=13.0)] == ["r12", "r11", "r10"]


def test_an_owner_is_alive_dead_or_unknown(tmp_path: Path) -> None:
    here = Owner.here()
    assert here.alive() is True
    assert replace(here, born=here.born + 1).alive() is False
    for unseen in (replace(here, host="x"), replace(here, boot="x"), replace(here, namespace="x"), Owner()):
        assert unseen.alive() is None
    assert str(here.pid) in str(here)
    assert "not known" in str(Owner())
