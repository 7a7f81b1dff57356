"""Many groups in one process: all at a time, and one after the other in the memory of a few."""

import gc
import sys

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from crucible_kitchen.byte_tokenizer import ByteTokenizer
from crucible_kitchen.rl.pipeline import Rollouts
from crucible_kitchen.rl.plan import PipelinePlan
from crucible_kitchen.rl.policy import PublishedPolicy
from crucible_kitchen.rl.rollout import Roller, RolloutRules
from crucible_kitchen.testing.environments import Letters
from crucible_kitchen.types import Sampled

pytestmark = pytest.mark.anyio
BYTES = ByteTokenizer(["<end>"], end="<end>", opening="{role}:")


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Abc:
    """A sampler that answers ``abc``, once all ``together`` who ask at a time have asked."""

    def __init__(self, together=1):
        self.asked, self.together, self.all_there = 0, together, anyio.Event()

    async def sample(self, prompt, params, n=1):
        self.asked += 1
        if self.asked >= self.together:
            self.all_there.set()
        await self.all_there.wait()
        await anyio.lowlevel.checkpoint()
        return [Sampled(np.frombuffer(b"abc", np.uint8), np.full(3, -1.0, np.float32), "abc", "stop")]

    async def aclose(self):
        pass


def rollouts_of(source, plan):
    return Rollouts(plan, order=lambda index: index % len(source))


def roller(source, policy):
    return Roller(source, policy, RolloutRules(group_size=2), tokenizer=BYTES)


async def test_a_thousand_groups_are_rolled_out_at_a_time(kit):
    source = Letters()
    rollouts = rollouts_of(source, PipelinePlan(1, 1000, workers=1000))
    policy = PublishedPolicy(Abc(together=2000))  # no rollout ends before those of all groups have begun
    async with kit.nothing_left(), rollouts.running(roller(source, policy)):
        async for batch in rollouts:
            groups = await batch.all()
            batch.trained()
    assert [group.ticket.index for group in groups] == list(range(1000))
    assert all(len(group.trajectories) == 2 for group in groups)
    assert source.opened == source.closed == 1000


async def test_ten_thousand_groups_go_through_in_the_memory_of_two_thousand(kit):
    source, policy = Letters(), PublishedPolicy(Abc())
    rollouts = rollouts_of(source, PipelinePlan(1250, 8, 1))
    blocks = {}
    async with kit.nothing_left(), rollouts.running(roller(source, policy)):
        async for batch in rollouts:
            await batch.all()
            await policy.publish(Abc(), batch.update + 1)
            batch.trained()
            if rollouts.version in (250, 1249):
                gc.collect()
                blocks[rollouts.version] = sys.getallocatedblocks()
    assert rollouts.ledger.trained == source.closed == 10_000
    assert blocks[1249] - blocks[250] < 100  # a group is more than a hundred


async def test_with_thirty_percent_of_crashes_every_environment_is_closed_and_no_place_is_lost(kit):
    source = Letters(crash="0.3")
    rollouts = rollouts_of(source, PipelinePlan(50, 8, 2))
    in_flight = []
    async with kit.nothing_left(), rollouts.running(roller(source, PublishedPolicy(Abc()))):
        async for batch in rollouts:
            assert all(0 < len(group.trajectories) <= 2 for group in await batch.all())
            batch.trained()
            in_flight.append(rollouts.in_flight)
    assert max(in_flight[40:]) == 8
    assert rollouts.ledger.trained == 400
    assert rollouts.ledger.dropped["env_fault"] == rollouts.ledger.drawn - 400 > 0
    assert source.opened == source.closed > 400
