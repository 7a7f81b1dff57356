"""Gymnasium's environments with discrete actions: ``gymnasium:CartPole-v1``.

One group is one vector environment of ``group_size`` copies, in a worker process with a hard limit of time per step.
Problem ``i`` is the ``i``-th set of initial states. Read next: ``gym_worker.py``, which holds the copies.
"""

import hashlib
import importlib
import json
from contextlib import AsyncExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import numpy as np

from crucible_kitchen.errors import ConfigError, MissingExtra, WorkerRaised
from crucible_kitchen.ports.environment import Space, VectorTransition
from crucible_kitchen.types import Array, IntArray
from crucible_kitchen.workers import ProcessLane, ProcessPool, run_sync
from crucible_kitchen_environments.options import amount, faults_of, value, whole

if TYPE_CHECKING:
    from crucible_kitchen_environments.gym_worker import Copies

__all__ = ["GymnasiumEnvironments"]

_WORKER = "crucible_kitchen_environments.gym_worker"
_MAKING_S = 60.0


class GymnasiumEnvironments:
    """A registered environment of gymnasium.

    Args:
        task: its id; ``module:id`` imports the module first, which registers it.
        problems: sets of initial states to train on.
        workers: worker processes, that is groups at once.
        step_timeout: seconds one batched step may take.
        isolation: ``process``; or ``none``, which steps the copies on the event loop: for environments that never
            block and take microseconds, such as CartPole, where a process costs more than the step.
        settings: the environment's own keyword arguments.

    Raises:
        MissingExtra: gymnasium is not installed.
        ConfigError: there is no such environment, or its actions are not discrete.
    """

    def __init__(
        self,
        task: str,
        *,
        problems: str = "10000",
        workers: str = "8",
        step_timeout: str = "30",
        isolation: str = "process",
        **settings: str,
    ) -> None:
        self.name = f"gymnasium:{task}"
        self._task = task
        self._problems = whole(self.name, "problems", problems)
        self._timeout = amount(self.name, "step_timeout", step_timeout)
        self._workers = whole(self.name, "workers", workers)
        self._settings: dict[str, Any] = {key: value(str(text)) for key, text in settings.items()}
        if isolation not in ("process", "none"):
            raise ConfigError(f"the environment {self.name!r}: isolation={isolation!r} is no 'process' or 'none'")
        self._isolation = isolation
        self._first = 0
        self._pool: ProcessPool | None = None
        try:
            import gymnasium
        except ImportError as error:
            raise MissingExtra("gymnasium", "envs") from error
        module, _, registered = task.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            gymnasium.spec(registered)
        except (ImportError, gymnasium.error.Error) as error:
            raise ConfigError(f"gymnasium has no environment {task!r}: {error}") from error

    @cached_property
    def space(self) -> Space:
        """Numbers of one flattened observation, and discrete actions.

        Raises:
            ConfigError: it cannot be made, or is not of this kind.
        """
        import gymnasium
        from gymnasium.spaces.utils import flatdim

        try:
            made = gymnasium.make(self._task, **self._settings)
        except Exception as error:
            raise ConfigError(f"{self.name} cannot be made: {error}") from error
        try:
            if not isinstance(made.action_space, gymnasium.spaces.Discrete):
                raise ConfigError(f"{self.name} has actions {made.action_space}; only discrete ones can be learned")
            try:
                features = flatdim(made.observation_space)
            except (NotImplementedError, ValueError) as error:
                raise ConfigError(f"{self.name} has observations {made.observation_space}, no fixed numbers") from error
            return Space(features, int(made.action_space.n))
        finally:
            made.close()

    def __len__(self) -> int:
        """Return the number of sets of initial states."""
        return self._problems

    async def fingerprint(self) -> str:
        """Hash the environment's name, version and settings: they determine every problem."""
        await anyio.lowlevel.checkpoint()
        import gymnasium

        text = json.dumps([self.name, gymnasium.__version__, self._first, self._problems, self._settings])
        return hashlib.sha256(text.encode()).hexdigest()

    def held_out(self) -> "GymnasiumEnvironments | None":
        """Return a hundred other sets of initial states; none for those."""
        if self._first:
            return None
        other = GymnasiumEnvironments(self._task, problems="100", workers=str(self._workers), isolation=self._isolation)
        other._settings, other._timeout, other._first = self._settings, self._timeout, self._problems
        return other

    async def open(self, problem: int, size: int, seed: int) -> "_Copies":
        """Make copies in a worker process; waits while all of them are at work."""
        if not 0 <= problem < self._problems:
            raise IndexError(f"{self.name} has no problem {problem}")
        key = (seed, self._first + problem)
        if self._isolation == "none":
            return await self._open_here(size, key)
        if self._pool is None:
            self._pool = ProcessPool(self.name, size=self._workers, timeout=self._timeout)
        held = AsyncExitStack()
        lane = await held.enter_async_context(self._pool.lane())
        try:
            with faults_of(f"making {self.name}"):
                await lane.call(f"{_WORKER}:make", self._task, size, self._settings, timeout=_MAKING_S)
        except BaseException:
            await held.aclose()
            raise
        return _Copies(self.name, lane, size, key, held)

    async def _open_here(self, size: int, key: tuple[int, int]) -> "_Copies":
        from crucible_kitchen_environments.gym_worker import Copies

        held = AsyncExitStack()
        here = _Here(await run_sync(Copies, self._task, size, self._settings))
        held.push_async_callback(run_sync, here.copies.close)
        return _Copies(self.name, here, size, key, held)

    async def aclose(self) -> None:
        """End the worker processes. Idempotent."""
        if self._pool is not None:
            await self._pool.aclose()


class _Here:
    """Copies in this process, asked like a worker."""

    def __init__(self, copies: "Copies") -> None:
        self.copies = copies

    async def call(self, function: str, *arguments: Any) -> Any:
        """Call a method of the copies; what it raises is named, as a worker would."""
        await anyio.lowlevel.checkpoint()
        try:
            return getattr(self.copies, function.rpartition(":")[2])(*arguments)
        except Exception as error:
            raise WorkerRaised(f"{function} raised {type(error).__name__}", type(error).__name__) from error


class _Copies:
    """One group of copies, in its worker until it is closed."""

    def __init__(
        self, name: str, lane: "ProcessLane | _Here", size: int, key: tuple[int, int], held: AsyncExitStack
    ) -> None:
        self._name = name
        self._lane = lane
        self._key = key
        self._held = held
        self.size = size

    async def reset(self, episodes: IntArray) -> Array:
        """Begin episodes, each from its own seed."""
        seeds = [self._seed(copy, int(episode)) for copy, episode in enumerate(episodes)]
        with faults_of(f"reset of {self._name}"):
            return _numbers(await self._lane.call(f"{_WORKER}:reset", seeds), np.float32)

    def _seed(self, copy: int, episode: int) -> int | None:
        if episode < 0:
            return None
        return int(np.random.SeedSequence((*self._key, copy, episode)).generate_state(1)[0])

    async def step(self, actions: IntArray) -> VectorTransition:
        """Step the copies that have an action."""
        with faults_of(f"a step of {self._name}"):
            moved = await self._lane.call(f"{_WORKER}:step", actions.tolist())
        return VectorTransition(
            _numbers(moved["rewards"], np.float64),
            np.asarray(moved["terminated"], dtype=bool),
            np.asarray(moved["truncated"], dtype=bool),
            _numbers(moved["observations"], np.float32),
        )

    async def aclose(self) -> None:
        """Give the worker back."""
        await self._held.aclose()


def _numbers(values: Any, kind: Any) -> Array:
    try:
        return np.asarray(values, dtype=kind)
    except ValueError:  # rows of different lengths: the shape says so, and is refused
        return np.zeros(0, dtype=kind)
