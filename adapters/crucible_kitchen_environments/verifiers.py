"""Environments of the package ``verifiers``: ``verifiers:ID``, where ID is an installed taskset.

The package plays an episode in a worker process, with its own tasks, tools, stops and rewards; wherever it asks its
model, the policy that is being trained answers, so every token that is trained was sampled here. Read next:
``crucible_kitchen_verifiers.worker``, which plays.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio

from crucible_kitchen.errors import ConfigError, EmptyDataset, EnvironmentFault, MissingExtra, WorkerError
from crucible_kitchen.ports.environment import Action, Episode, Observation, Transition
from crucible_kitchen.types import Message
from crucible_kitchen.workers import ProcessLane, ProcessPool, run_sync
from crucible_kitchen_environments.options import amount, faults_of, value, whole

__all__ = ["VerifiersEnvironments"]

_WORKER = "crucible_kitchen_verifiers.worker"
_FOLDER = "CRUCIBLE_KITCHEN_VERIFIERS_FOLDER"  # where a worker puts the folders of its episodes
_OPENING_S = 300.0  # the first call imports the package and loads the tasks


@dataclass(frozen=True)
class _Tasks:
    """Which tasks of the taskset are trained on or held out, by position."""

    train: list[int]
    held_out: list[int]
    fingerprint: str


class VerifiersEnvironments:
    """A taskset of verifiers with one seat; a twentieth of its tasks, by their hash, is held out.

    Args:
        task: its id: the module that exports it.
        problems: so many of its tasks, at most.
        timeout: seconds the environment may take between two turns of the policy, its rewards included.
        workers: worker processes, that is groups at once.
        settings: the taskset's own.

    Raises:
        MissingExtra: verifiers is not installed.
        ConfigError: there is no such taskset, or an option does not fit.
    """

    space = None

    def __init__(
        self, task: str, *, problems: str = "1000", timeout: str = "60", workers: str = "4", **settings: str
    ) -> None:
        self.name = f"verifiers:{task}"
        self._task = task
        self._most = whole(self.name, "problems", problems)
        self._timeout = amount(self.name, "timeout", timeout)
        self._workers = whole(self.name, "workers", workers)
        self._settings: dict[str, Any] = {key: value(str(text)) for key, text in settings.items()}
        self._held_out = False
        self._pool: ProcessPool | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        package = find_spec("verifiers")
        if package is None:
            raise MissingExtra("verifiers", "verifiers")
        module = task.rpartition("/")[2].partition("@")[0].replace("-", "_").lower()  # as the package finds it
        shipped = [Path(place) / "v1" / "tasksets" / module for place in package.submodule_search_locations or ()]
        if not module.isidentifier() or not (find_spec(module) or any(folder.is_dir() for folder in shipped)):
            raise ConfigError(
                f"there is no taskset {task!r}: no module {module!r} is installed",
                hint="install the package that exports it",
            )

    @cached_property
    def _tasks(self) -> _Tasks:
        """Load the tasks in a process that ends with it; blocking, and not on an event loop."""
        try:
            return _Tasks(**anyio.run(self._described))
        except WorkerError as error:
            raise ConfigError(f"{self.name} cannot be loaded: {error.message}") from error

    async def _described(self) -> Any:
        async with ProcessLane(self.name, timeout=_OPENING_S) as lane:
            return await lane.call(f"{_WORKER}:describe", self._task, self._settings, self._most)

    @property
    def _places(self) -> list[int]:
        return self._tasks.held_out if self._held_out else self._tasks.train

    def __len__(self) -> int:
        """Return the number of problems; loads them, in a thread without an event loop.

        Raises:
            ConfigError: the taskset cannot be loaded.
            EmptyDataset: it has no task.
        """
        if not self._places:
            raise EmptyDataset(f"{self.name} has no problem")
        return len(self._places)

    async def fingerprint(self) -> str:
        """Hash the tasks, the settings and the package's version."""
        tasks = (await run_sync(lambda: self._tasks)).fingerprint
        text = json.dumps([self.name, self._settings, self._held_out, tasks, version("verifiers")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def held_out(self) -> "VerifiersEnvironments | None":
        """Return the tasks that are held out, or None where there are none or these are they."""
        if self._held_out or not self._tasks.held_out:
            return None
        options = {key: str(text) for key, text in self._settings.items()}
        counts = {"problems": str(self._most), "timeout": str(self._timeout), "workers": str(self._workers)}
        other = VerifiersEnvironments(self._task, **counts, **options)
        other._held_out, other._tasks = True, self._tasks
        return other

    async def open(self, problem: int, size: int, seed: int) -> "_Group":
        """Open a task in a worker process; waits while all of them are at work."""
        places = await run_sync(lambda: self._places)
        if not 0 <= problem < len(places):
            raise IndexError(f"{self.name} has no problem {problem}")
        held = AsyncExitStack()
        lane = await held.enter_async_context(self._processes().lane())
        try:
            with faults_of(f"opening {self.name}"):
                opening = (self._task, self._settings, places[problem], size, seed)
                await lane.call(f"{_WORKER}:open_group", *opening, timeout=_OPENING_S)
        except BaseException:
            await held.aclose()
            raise
        return _Group(self.name, lane, size, held)

    def _processes(self) -> ProcessPool:
        if self._pool is None:
            self._folder = tempfile.TemporaryDirectory(prefix="crucible-kitchen-")
            environment = {**os.environ, _FOLDER: self._folder.name}
            self._pool = ProcessPool(self.name, size=self._workers, timeout=self._timeout, environment=environment)
        return self._pool

    async def aclose(self) -> None:
        """End the worker processes, and remove what they left. Idempotent."""
        if self._pool is not None:
            await self._pool.aclose()
        if self._folder is not None:
            await run_sync(self._folder.cleanup)


class _Group:
    """One task in its worker, until it is closed. The package's rewards are of single episodes: nothing is compared."""

    def __init__(self, name: str, lane: ProcessLane, size: int, held: AsyncExitStack) -> None:
        self.environments = [_Member(self, i) for i in range(size)]
        self.name = name
        self._lane = lane
        self._process = lane.starts
        self._held = held
        self._closed = False

    async def play(self, function: str, *arguments: Any) -> dict[str, Any]:
        """Have the worker play on; a process that was killed took all of the group with it."""
        if self._lane.pid is None or self._lane.starts != self._process:
            raise EnvironmentFault(f"the worker of {self.name} was ended by another member")
        with faults_of(f"a turn of {self.name}"):
            found: Any = await self._lane.call(f"{_WORKER}:{function}", *arguments)
        if "fault" in found:
            raise EnvironmentFault(f"an episode of {self.name} failed: {found['fault']}")
        return found  # type: ignore[no-any-return]

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        """Compare nothing."""
        await anyio.lowlevel.checkpoint()
        return [0.0] * len(episodes)

    async def aclose(self) -> None:
        """End the episodes that are not over, and give the worker back."""
        if self._closed:
            return
        self._closed = True
        with suppress(WorkerError):  # its process is gone, and the episodes with it
            if self._lane.pid is not None:
                await self._lane.call(f"{_WORKER}:close")
        await self._held.aclose()


class _Member:
    """One episode."""

    def __init__(self, group: _Group, member: int) -> None:
        self._group = group
        self._member = member

    async def reset(self) -> Observation:
        """Begin the episode and return what the policy is told first."""
        found = await self._group.play("begin", self._member)
        if "told" not in found:
            raise EnvironmentFault(f"{self._group.name} ended before the policy spoke")
        return _observation(found)

    async def step(self, action: Action) -> Transition:
        """Say what the policy said."""
        found = await self._group.play("answer", self._member, action.text, action.complete)
        if "told" in found:
            return Transition(0.0, terminated=False, observation=_observation(found))
        cut = bool(found["truncated"])
        return Transition(float(found["reward"]), terminated=not cut, truncated=cut, metrics=found["metrics"])


def _observation(found: dict[str, Any]) -> Observation:
    return Observation(tuple(Message(role, content) for role, content in found["told"]))
