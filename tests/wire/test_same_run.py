"""The same run over the wire gives the same numbers and the same weights, whatever happens to the messages."""

import pytest

from crucible_kitchen.testing.proxy import FAULTS, FaultyProxy
from crucible_kitchen_http import HttpTrainingClient

pytestmark = pytest.mark.anyio


def check_same(expected, found):
    losses, files = expected
    assert found[0].shape == losses.shape
    assert abs(found[0] - losses).max() <= 1e-6
    assert found[1] == files, "the exported weights differ in a bit"


def port(server):
    return int(server.url.rpartition(":")[2])


async def test_a_run_over_http_ends_with_the_bits_of_the_local_run(client, local, run_training, tmp_path):
    check_same(local, await run_training(client, tmp_path, custom=False))


async def test_an_emulated_loss_gives_the_local_run_up_to_rounding(local, undisturbed):
    assert abs(undisturbed[0] - local[0]).max() <= 1e-5 * abs(local[0]).max()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_that_befalls_many_messages_changes_nothing(fault, server, undisturbed, run_training, tmp_path):
    async with FaultyProxy(port(server), 0.3, 1, [fault]).open() as proxy:
        client = HttpTrainingClient(base_url=proxy.url, api_key="a-key", timeout=5.0)
        found = await run_training(client, tmp_path)
        await client.aclose()
        assert proxy.done[fault] > 5
    check_same(undisturbed, found)


@pytest.mark.parametrize("seed", range(3))
async def test_all_faults_together_change_nothing(seed, server, undisturbed, run_training, tmp_path):
    async with FaultyProxy(port(server), 0.3, seed).open() as proxy:
        client = HttpTrainingClient(base_url=proxy.url, api_key="a-key", timeout=5.0)
        found = await run_training(client, tmp_path)
        await client.aclose()
        assert len(proxy.done) == len(FAULTS)
    check_same(undisturbed, found)
