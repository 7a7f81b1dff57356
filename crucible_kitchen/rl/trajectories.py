"""What rollouts leave behind: trajectories, and the typed outcomes that keep a fault from ever being a reward.

Plain values. Read next: ``crucible_kitchen.rl.rollout``.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np

from crucible_kitchen.types import Array, Float64Array, IntArray, JsonObject

__all__ = [
    "EnvFault",
    "InfraFault",
    "Outcome",
    "Scored",
    "Ticket",
    "Timeout",
    "Trajectory",
    "TrajectoryGroup",
    "Truncated",
]


@dataclass(frozen=True, slots=True)
class Ticket:
    """One problem drawn to be rolled out.

    Attributes:
        index: how many were drawn before it in the run; everything random in its rollouts comes from (run seed, index,
            member), never from when it is rolled out.
        problem: its number in the environment's source.
        carried: where the group before it stopped, if it goes on from there.
    """

    index: int
    problem: int
    carried: JsonObject | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One episode, or a part, in the positions of a ``Datum``: position t has seen everything before ``targets[t]``.

    Attributes:
        inputs: ``tokens`` int64 [T] or ``observations`` float32 [T, D].
        after: what follows the last position, one position of the same inputs: where the value of a cut episode is.
        targets: int64 [T], tokens or actions.
        mask: bool [T], where the policy acted; prompts, templates and tool output are holes.
        logprobs: float32 [T], of the targets under the policy that sampled; 0 in holes.
        versions: int32 [T], which published policy sampled; -1 in holes.
        rewards: float64 [T], on the last position of each action.
        terminated: the episode ended by itself; otherwise it was cut.
        metrics: of its last transition.
        before: reward of the same episode in an earlier group.
        goes_on: the next group goes on with the episode.
    """

    inputs: Mapping[str, Array]
    after: Mapping[str, Array]
    targets: IntArray
    mask: Array
    logprobs: Array
    versions: Array
    rewards: Float64Array
    terminated: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    before: float = 0.0
    goes_on: bool = False

    def __len__(self) -> int:
        """Return T."""
        return len(self.targets)

    @property
    def reward(self) -> float:
        """The sum of its episode's rewards so far."""
        return self.before + float(self.rewards.sum())

    @property
    def actions(self) -> int:
        """Positions where the policy acted."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True, slots=True)
class Scored:
    """An episode that ended by itself, and its reward. Trains."""

    trajectory: Trajectory
    kind: ClassVar[str] = "scored"


@dataclass(frozen=True, slots=True)
class Truncated:
    """An episode that was cut at a limit of turns or of the context, or goes on, with the reward so far. Trains."""

    trajectory: Trajectory
    kind: ClassVar[str] = "truncated"


@dataclass(frozen=True, slots=True)
class EnvFault:
    """The environment or its reward broke. ``reason`` quotes no data."""

    reason: str
    kind: ClassVar[str] = "env_fault"


@dataclass(frozen=True, slots=True)
class InfraFault:
    """Something the rollout stands on broke: the sampler, a server."""

    reason: str
    kind: ClassVar[str] = "infra_fault"


@dataclass(frozen=True, slots=True)
class Timeout:
    """The episode did not end in time."""

    reason: str
    kind: ClassVar[str] = "timeout"


Outcome: TypeAlias = Scored | Truncated | EnvFault | InfraFault | Timeout


@dataclass(frozen=True, slots=True, eq=False)
class TrajectoryGroup:
    """All outcomes of one problem.

    Attributes:
        ticket: which problem.
        outcomes: one per member, in their order; of a segment one per episode or part of one.
        seconds: what the rollouts took, all attempts.
        spent: seconds of all members by cause: ``sampling``, ``environment``.
        retries: attempts after the first.
        least: members that a group needs at least.
        carried: where it stopped, if the next group goes on from there.
    """

    ticket: Ticket
    outcomes: tuple[Outcome, ...]
    seconds: float = 0.0
    spent: Mapping[str, float] = field(default_factory=dict)
    retries: int = 0
    least: int = 1
    carried: JsonObject | None = None

    @property
    def trajectories(self) -> list[Trajectory]:
        """Those that train, in the order of the members."""
        return [o.trajectory for o in self.outcomes if isinstance(o, (Scored, Truncated))]

    @property
    def kinds(self) -> Counter[str]:
        """How many outcomes there are of each kind."""
        return Counter(outcome.kind for outcome in self.outcomes)

    @property
    def unusable(self) -> str | None:
        """Why the group cannot be trained: the most frequent fault; None if it can."""
        good = sum(isinstance(o, (Scored, Truncated)) for o in self.outcomes)
        if good >= self.least:
            return None
        faults = [o for o in self.outcomes if not isinstance(o, (Scored, Truncated))]
        return Counter(f"{o.kind}: {o.reason}" for o in faults).most_common(1)[0][0] if faults else "too few members"

    @property
    def rewards(self) -> Float64Array:
        """float64 [G], of the trajectories."""
        return np.array([t.reward for t in self.trajectories], dtype=np.float64)

    @property
    def length(self) -> int:
        """Positions where the policy acted, all trajectories."""
        return sum(t.actions for t in self.trajectories)

    def versions(self) -> Array:
        """Return int32 [n], the policy version of each position where the policy acted."""
        found = [t.versions[t.mask] for t in self.trajectories]
        return np.concatenate(found) if found else np.zeros(0, np.int32)
