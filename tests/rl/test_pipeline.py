"""Rollouts from draw to update: what is trained, how old it is, what fails, and that it all adds up."""

import anyio
import numpy as np
import pytest

from crucible_kitchen.errors import CapabilityError, EnvironmentFault
from crucible_kitchen.rl.plan import PipelinePlan

pytestmark = pytest.mark.anyio
POLICIES = ["aggregate", "block", "discard", "cancel"]


def plan(batches=30, per_batch=8, max_staleness=0, staleness="aggregate", **options):
    return PipelinePlan(batches, per_batch, max_staleness, staleness, **{"workers": 8, **options})


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio", "virtual"], indirect=True)
async def test_every_group_that_is_drawn_is_trained_exactly_once_and_no_more_are_drawn_than_needed(kit):
    load, trained = kit.Load(mean=0.001, sigma=0.5), kit.Trained()
    async with kit.nothing_left():
        rollouts = kit.pipeline(load, plan(batches=5, max_staleness=2), trained)
        await kit.learn(rollouts, load, trained, seconds=0.001)
    assert sorted(trained.indices) == list(range(40))
    assert [len(batch) for batch in trained.batches] == [8] * 5
    assert (rollouts.ledger.drawn, rollouts.ledger.trained) == (40, 40)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("streaming", [True, False])
async def test_no_more_groups_are_ever_open_than_the_bound_allows(kit, policy, k, streaming):
    load, trained = kit.Load(), kit.Trained()
    rollouts = kit.pipeline(load, plan(max_staleness=k, staleness=policy, workers=64), trained)
    await kit.learn(rollouts, load, trained, streaming=streaming)
    assert load.most_running <= 8 * (k + 1)
    assert len(trained.batches) == 30
    assert sum(rollouts.measured.staleness.values()) == 240


@pytest.mark.parametrize("policy", ["block", "discard", "cancel"])
@pytest.mark.parametrize("k", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
async def test_strict_policies_never_train_what_is_older_than_the_bound(kit, policy, k, seed):
    load, trained = kit.Load(sigma=1.5, seed=seed), kit.Trained()
    rollouts = kit.pipeline(load, plan(max_staleness=k, staleness=policy), trained)
    await kit.learn(rollouts, load, trained)
    assert max(trained.ages) <= k
    assert max(rollouts.measured.staleness) <= k
    assert len(trained.batches) == 30
    if policy == "block":
        assert not rollouts.ledger.dropped


async def test_the_bound_of_the_mean_loses_nothing_and_says_how_old_the_oldest_was(kit):
    load, trained = kit.Load(sigma=1.5), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=60, max_staleness=1), trained)
    await kit.learn(rollouts, load, trained)
    assert np.mean(trained.ages) <= 1.0
    assert max(trained.ages) == max(rollouts.measured.staleness) > 1
    assert (rollouts.measured.waste, rollouts.length_bias) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "least"), [(0, 0.29), (1, 0.88), (2, 0.93), (4, 0.96)])
async def test_streaming_overlaps_as_much_as_the_load_allows(kit, k, least):
    """The standard load: 8 groups per batch, 8 at a time, log-normal 50 ms with sigma 1, a learner of 50 ms."""
    load, trained = kit.Load(), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=300, max_staleness=k), trained)
    await kit.learn(rollouts, load, trained)
    assert 300 * 0.05 / rollouts.learner.wall >= least
    assert not rollouts.ledger.dropped


async def test_every_second_has_one_cause_and_all_add_up_to_the_wall_clock(kit):
    load, trained = kit.Load(), kit.Trained()
    rollouts = kit.pipeline(load, plan(max_staleness=1), trained)
    began = anyio.current_time()
    await kit.learn(rollouts, load, trained)
    wall = anyio.current_time() - began
    assert sum(rollouts.learner.spent().values()) == pytest.approx(wall)
    assert rollouts.learner.spent()["compute"] == pytest.approx(30 * 0.05)
    for worker in rollouts.workers:
        assert sum(worker.spent().values()) == pytest.approx(wall)


async def test_overlap_efficiency_is_the_longer_of_both_works_over_the_wall_clock(kit):
    load, trained = kit.Load(mean=1.0, sigma=0.0), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=3, per_batch=2, workers=2), trained)
    await kit.learn(rollouts, load, trained, seconds=0.5)
    assert rollouts.learner.wall == pytest.approx(3 * 1.5)
    assert rollouts.efficiency == pytest.approx(1.0 / 1.5)  # two workers rolled out six seconds
    assert rollouts.learner.spent()["wait"] == pytest.approx(3 * 1.0)


async def test_without_staleness_batches_are_consecutive_whatever_arrives_first(kit):
    load, trained = kit.Load(), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=4), trained)
    await kit.learn(rollouts, load, trained)
    assert [sorted(batch) for batch in trained.batches] == [list(range(i, i + 8)) for i in range(0, 32, 8)]
    assert trained.batches[0] != sorted(trained.batches[0])

    load, trained = kit.Load(), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=4, in_order=True), trained)
    await kit.learn(rollouts, load, trained)
    assert trained.batches == [list(range(i, i + 8)) for i in range(0, 32, 8)]


# -- failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("seed", range(3))
async def test_with_thirty_percent_of_crashes_training_completes_and_no_place_is_lost(kit, k, seed):
    rng = np.random.default_rng(seed)

    def fails(ticket, attempt):
        return RuntimeError("boom") if rng.random() < 0.3 else None

    load, trained = kit.Load(fails=fails, seed=seed), kit.Trained()
    async with kit.nothing_left():
        rollouts = kit.pipeline(load, plan(max_staleness=k, quarantine_after=2), trained)
        await kit.learn(rollouts, load, trained)
    assert len(trained.batches) == 30
    assert len(set(trained.indices)) == 240
    ledger = rollouts.ledger
    assert ledger.drawn == 240 + ledger.dropped.total()
    assert set(ledger.dropped) == {"quarantined"}
    assert not set(trained.dropped) & set(trained.indices)


async def test_a_problem_that_kills_its_actors_is_given_up_and_named(kit):
    def fails(ticket, attempt):
        return ValueError("poison") if ticket.index == 3 else None

    load, trained = kit.Load(fails=fails), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=2, quarantine_after=2), trained)
    await kit.learn(rollouts, load, trained)
    assert trained.dropped == {3: "quarantined: ValueError"}
    assert load.attempts[3] == 2
    assert sorted(trained.indices) == [0, 1, 2, *range(4, 17)]


async def test_unusable_groups_are_dropped_with_their_reason_and_replaced(kit):
    load = kit.Load(fails=lambda ticket, attempt: "timeout: late" if ticket.index % 4 == 0 else None)
    trained = kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=3), trained)
    await kit.learn(rollouts, load, trained)
    assert set(trained.dropped.values()) == {"timeout: late"}
    assert rollouts.ledger.dropped["timeout"] == len(trained.dropped) >= 6
    assert not any(index % 4 == 0 for index in trained.indices)


async def test_an_environment_that_never_works_ends_the_run_with_the_reason(kit):
    load, trained = kit.Load(fails=lambda ticket, attempt: "env_fault: it is broken"), kit.Trained()
    rollouts = kit.pipeline(load, plan(), trained)
    with pytest.raises(EnvironmentFault, match="in a row came to nothing, the last because: env_fault: it is broken"):
        await kit.learn(rollouts, load, trained)


async def test_what_no_rollout_would_be_spared_ends_the_run_at_once(kit):
    load = kit.Load(fails=lambda ticket, attempt: CapabilityError("cannot") if ticket.index == 2 else None)
    rollouts = kit.pipeline(load, plan(), fatal=(CapabilityError,))
    with pytest.raises(CapabilityError, match="cannot"):
        await kit.learn(rollouts, load, kit.Trained())
    assert load.attempts[2] == 1


async def test_a_rollout_that_hangs_is_named_with_how_long_it_has_been_out(kit):
    load = kit.Load()
    rollouts = kit.pipeline(load, plan(batches=1, per_batch=2, workers=2))

    async def produce(ticket):
        await (anyio.sleep_forever() if ticket.index == 1 else anyio.sleep(1.0))
        return kit.Group(ticket, 0, 1.0)

    with anyio.move_on_after(10.0):
        async with rollouts.running(produce):
            async for batch in rollouts:
                async for group in batch:
                    assert group.ticket.index == 0
                    await anyio.sleep(3.0)
                    assert rollouts.waiting_for() == [(1, pytest.approx(4.0))]


@pytest.mark.parametrize("moment", np.linspace(0.001, 0.9, 12))
async def test_cancelling_at_any_moment_leaves_nothing(kit, moment):
    load, trained = kit.Load(), kit.Trained()
    async with kit.nothing_left():
        rollouts = kit.pipeline(load, plan(max_staleness=2, staleness="cancel"), trained)
        with anyio.move_on_after(moment):
            await kit.learn(rollouts, load, trained)
    assert load.running == 0
    rollouts.check()


# -- position ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("cuts", [[1], [3, 4], [2, 5, 6, 9]])
async def test_after_a_restart_nothing_is_trained_twice_and_nothing_is_lost(kit, k, cuts):
    trained, position = kit.Trained(), None
    for until in (*cuts, None):
        load = kit.Load()
        rollouts = kit.pipeline(load, plan(batches=12, max_staleness=k), trained)
        if position is not None:
            rollouts.seek(position)
        position = await kit.learn(rollouts, load, trained, until=until)
    assert sorted(trained.indices) == list(range(96))
    assert rollouts.ledger.trained == rollouts.ledger.drawn == 96
    assert np.mean(trained.ages) <= k
    if k == 0:
        assert [sorted(batch) for batch in trained.batches] == [list(range(i, i + 8)) for i in range(0, 96, 8)]


async def test_what_was_in_flight_or_buffered_is_drawn_again_first(kit):
    load, trained = kit.Load(), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=12, max_staleness=2), trained)
    position = await kit.learn(rollouts, load, trained, until=2)
    again = set(position["again"])
    assert again
    assert again | set(trained.indices) == set(range(position["next"]))
    load = kit.Load()
    resumed = kit.pipeline(load, plan(batches=12, max_staleness=2), trained)
    resumed.seek(position)
    assert resumed.position() == position
    await kit.learn(resumed, load, trained)
    for whom, before in position["seconds"].items():
        now = resumed.seconds()[whom]
        assert all(now[cause] >= seconds for cause, seconds in before.items())
    assert sum(resumed.seconds()["learner"].values()) == pytest.approx(resumed.learner.wall)
    assert resumed.ledger.requeued == len(again)
    assert again <= set(load.attempts)


@pytest.mark.parametrize("k", [0, 2])
async def test_a_group_goes_on_from_the_one_before_it_also_after_a_restart(kit, k):
    trained, position, carried = kit.Trained(), None, {}
    for until in (2, 3, 7, None):
        load = kit.Load()
        rollouts = kit.pipeline(load, plan(batches=10, per_batch=1, workers=1, max_staleness=k), trained)
        if position is not None:
            rollouts.seek(position)
        position = await kit.learn(rollouts, load, trained, until=until)
        carried |= load.carried
    assert carried == {0: None} | {index: {"after": index - 1} for index in range(1, 10)}


async def test_after_a_group_that_came_to_nothing_the_next_goes_on_from_nowhere(kit):
    load, trained = (
        kit.Load(fails=lambda ticket, _: "env_fault: it broke" if ticket.index == 3 else None),
        kit.Trained(),
    )
    await kit.learn(kit.pipeline(load, plan(batches=5, per_batch=1, workers=1), trained), load, trained)
    assert load.carried == {0: None, 1: {"after": 0}, 2: {"after": 1}, 3: {"after": 2}, 4: None, 5: {"after": 4}}


async def test_a_checkpoint_between_the_update_and_the_next_batch_goes_on_with_an_empty_one(kit):
    load, trained = kit.Load(), kit.Trained()
    rollouts = kit.pipeline(load, plan(batches=3), trained)
    position = await kit.learn(rollouts, load, trained, until=1)
    assert position["over"]
    resumed = kit.pipeline(kit.Load(), plan(batches=3), trained)
    resumed.seek(position)
    async with resumed.running(load):
        async for batch in resumed:
            assert (len(batch), batch.update) == (0, 0)
            assert await batch.all() == []
            break
