"""Environments: what a policy acts in, and what its actions are worth.

A *source* numbers its problems; opening one gives a group of equal environments, which are rolled out together. They
know no model: a language environment speaks in messages, a vector environment in arrays. They are found by the entry
point group ``crucible_kitchen.environments``. Read next: ``crucible_kitchen.rl.environments``.

**Failing.** What an environment raises is never a reward. ``EnvironmentFault`` (or any foreign exception) says that the
environment broke, ``EnvironmentTimeout`` (or any ``TimeoutError``) that it took too long, a ``BackendError`` that
something it stands on did. Each becomes an outcome of its own and trains nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from crucible_kitchen.types import Array, IntArray, Message

__all__ = [
    "Action",
    "Environment",
    "EnvironmentFactory",
    "EnvironmentGroup",
    "EnvironmentSource",
    "Episode",
    "Observation",
    "Space",
    "Transition",
    "VectorEnvironment",
    "VectorTransition",
]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a language policy is told next: the whole prompt at first, then only what is new.

    Attributes:
        messages: of the system, the user or a tool; for a policy without a chat template their contents are joined.
        stop: text that ends the policy's next turn, besides its own end token.
    """

    messages: tuple[Message, ...]
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Action:
    """One turn of a language policy.

    Attributes:
        text: decoded, without end token and stop text.
        tokens: int64 [T], as they were sampled.
        complete: the policy ended its turn; False: it was cut at ``max_tokens`` or at the context's end.
    """

    text: str
    tokens: IntArray
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Transition:
    """What follows an action.

    Attributes:
        reward: of this action; finite.
        terminated: the episode is over by itself: nothing follows, the value of what follows is 0.
        truncated: the episode was cut (a limit of turns or time): more would have followed.
        observation: what the policy is told next; needed unless the episode is over.
        metrics: numbers to report, averaged over episodes.
    """

    reward: float
    terminated: bool
    truncated: bool = False
    observation: Observation | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Episode:
    """What group rewards are computed from: one member's whole episode.

    Attributes:
        member: its place in the group, from 0.
        reward: the sum of its rewards.
        texts: its actions, turn by turn.
        metrics: of its last transition.
    """

    member: int
    reward: float
    texts: tuple[str, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """One episode of a language environment: ``reset`` once, then ``step`` until it is over.

    Blocking code runs in a worker process with a hard time limit, never on the event loop.
    """

    async def reset(self) -> Observation:
        """Begin the episode and return the prompt."""
        ...

    async def step(self, action: Action) -> Transition:
        """Take one action."""
        ...


@runtime_checkable
class EnvironmentGroup(Protocol):
    """One problem, opened ``size`` times."""

    @property
    def environments(self) -> Sequence[Environment]:
        """The members, rolled out concurrently."""
        ...

    async def group_rewards(self, episodes: Sequence[Episode]) -> Sequence[float]:
        """Return what is added to each episode's last reward once all are there; zeros where nothing is compared.

        Members whose rollouts failed are missing.
        """
        ...

    async def aclose(self) -> None:
        """Release what the group holds. Idempotent; safe at any time, also while a member is stepped."""
        ...


@dataclass(frozen=True, slots=True)
class Space:
    """What a vector environment's policy sees and does.

    Attributes:
        features: D, numbers of one observation.
        actions: A, the actions are 0 to A - 1.
    """

    features: int
    actions: int


@dataclass(frozen=True, slots=True, eq=False)
class VectorTransition:
    """What follows one batched action of G members; entries of members that were not stepped are ignored.

    Attributes:
        rewards: float64 [G].
        terminated: bool [G], see ``Transition``.
        truncated: bool [G].
        observations: float32 [G, D], what the action led to, *before* any reset.
    """

    rewards: Array
    terminated: Array
    truncated: Array
    observations: Array


@runtime_checkable
class VectorEnvironment(Protocol):
    """G copies that are stepped together: one array of actions, one of observations.

    The episodes of a member are numbered. How episode n begins depends on problem, seed, member and n alone, and what
    follows on its actions alone: so an environment can be brought to where another one stands.
    """

    @property
    def size(self) -> int:
        """G."""
        ...

    async def reset(self, episodes: IntArray) -> Array:
        """Begin episode ``episodes[g]`` of each member, int64 [G], and return observations, float32 [G, D].

        Members with a negative number stay as they are.
        """
        ...

    async def step(self, actions: IntArray) -> VectorTransition:
        """Take one action each, int64 [G]; members with a negative one stay as they are."""
        ...

    async def aclose(self) -> None:
        """Release what it holds. Idempotent."""
        ...


class EnvironmentSource(Protocol):
    """Problems by index. Constructed with options only; does no work in its constructor and imports nothing heavy.

    Guarantees: problem ``i`` is the same in every run and process with equal options; everything random in a group
    comes from the ``seed`` it is opened with; groups may be opened and rolled out concurrently.
    """

    @property
    def name(self) -> str:
        """As it was asked for: ``sums``, ``gymnasium:CartPole-v1``."""
        ...

    @property
    def space(self) -> Space | None:
        """What its policy sees and does; None for language."""
        ...

    def __len__(self) -> int:
        """Return the number of problems, 1 or more; may do the work that the constructor did not."""
        ...

    async def fingerprint(self) -> str:
        """Return a hash (hex) of the problems and the options; equal hashes are equal problems."""
        ...

    def held_out(self) -> "EnvironmentSource | None":
        """Return problems that are never trained on, or None where there are none."""
        ...

    async def open(self, problem: int, size: int, seed: int) -> EnvironmentGroup | VectorEnvironment:
        """Open one problem for ``size`` members; ``space`` says which kind it gives.

        Raises:
            IndexError: there is no such problem.
            EnvironmentFault: it cannot be opened.
        """
        ...

    async def aclose(self) -> None:
        """Release what the source holds: worker processes, sandboxes. Idempotent."""
        ...


class EnvironmentFactory(Protocol):
    """What an entry point of the group ``crucible_kitchen.environments`` leads to: a class or a function.

    ``env=NAME:TASK`` gives it ``task="TASK"`` (``""`` without one); ``env_options`` are its keyword arguments, text
    as it was written.
    """

    def __call__(self, task: str, **options: str) -> EnvironmentSource:
        """Return the source.

        Raises:
            ConfigError: no such task, or an option is unknown or does not fit.
            MissingExtra: a package is not installed.
        """
        ...
