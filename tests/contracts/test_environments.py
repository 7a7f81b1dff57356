"""Every shipped environment keeps the environments' contract."""

from functools import partial

import pytest

from crucible_kitchen.rl.environments import open_environment
from crucible_kitchen.testing import contracts
from crucible_kitchen.testing.environments import Letters

SOURCES = {
    **{name: partial(open_environment, name) for name in ("sums", "reverse", "sort", "parity")},
    "letters": partial(Letters, turns="3"),
    "gymnasium": partial(open_environment, "gymnasium:CartPole-v1"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("check", contracts.ENVIRONMENT, ids=contracts.name)
async def test_an_environment_keeps_its_contract(name, check):
    if name == "gymnasium":
        pytest.importorskip("gymnasium")
    await check(contracts.EnvironmentCase(SOURCES[name]))
