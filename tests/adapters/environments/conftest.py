"""Where the kernel forbids namespaces the sandbox refuses to start, and what needs it is skipped with that reason.

A machine that has to show that it ran sets ``CRUCIBLE_KITCHEN_SANDBOX=required``, as ``.ci/run`` does: then nothing is
skipped, and what cannot run fails.
"""

import os
from collections.abc import Callable

import anyio
import pytest

from crucible_kitchen.errors import SandboxUnavailable
from crucible_kitchen_environments.sandbox import Sandbox


def _need_namespaces() -> None:
    async def start() -> None:
        async with Sandbox(workers=1):
            pass

    try:
        anyio.run(start)
    except SandboxUnavailable as refusal:
        if os.environ.get("CRUCIBLE_KITCHEN_SANDBOX") == "required":
            raise
        pytest.skip(str(refusal))


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip what needs the sandbox where it cannot start."""
    _need_namespaces()


@pytest.fixture
def need_namespaces() -> Callable[[], None]:
    """What ``namespaces`` does, for the test of it."""
    return _need_namespaces
