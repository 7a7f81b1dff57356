"""What the engine's tests share: both backends, a log in memory, and a guard against anything left behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.config import RunConfig
from crucible_kitchen.events import Event, EventRecord
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.run import RunContext


@pytest.fixture(params=["asyncio", "trio", "virtual"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """asyncio, trio, and trio with a clock that jumps: what is true must be true on all three."""
    return virtual_clock() if request.param == "virtual" else request.param


@dataclass
class Log:
    """A recorder in memory."""

    records: list[EventRecord] = field(default_factory=list)
    syncs: int = 0

    def emit(self, event: Event) -> EventRecord:
        record = EventRecord("r", len(self.records) + 1, 0.0, event)
        self.records.append(record)
        return record

    async def drain(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def sync(self) -> None:
        self.syncs += 1
        await anyio.lowlevel.checkpoint()

    @property
    def lines(self) -> list[str]:
        """Each event as ``name path``, with the code of an error."""
        return [_line(r.event) for r in self.records]


def _line(event: Any) -> str:
    tail = f" {event.code} {event.action}" if event.name == "stage.error" else ""
    return f"{event.name} {getattr(event, 'path', '')}{tail}"


Runner = Callable[..., Any]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def run_workflow(log: Log, tmp_path: Path) -> Runner:
    """Check a workflow and run it; returns the state."""

    async def run(
        workflow: Workflow,
        config: RunConfig | None = None,
        adapters: Mapping[str, Any] | None = None,
        *,
        checked: bool = True,
    ) -> dict[str, Any]:
        if checked:
            check(workflow)
        context = RunContext("r", workflow.name, seed=7, directory=tmp_path, recorder=log)
        before = {task.id for task in anyio.get_running_tasks()}
        try:
            return await execute(workflow, config or workflow.config(), adapters or {}, context)
        finally:
            left = [task for task in anyio.get_running_tasks() if task.id not in before]
            assert not left, f"tasks left behind: {left}"

    return run
