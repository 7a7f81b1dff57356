"""What rollouts cost and what became of it, in tokens: waste, length bias, and how old each token was when it trained.

Counts only. Read next: ``crucible_kitchen.rl.pipeline``, which counts.
"""

from collections import Counter
from dataclasses import dataclass, field

from crucible_kitchen.rl.plan import Rolled
from crucible_kitchen.types import JsonObject

__all__ = ["Measures"]


@dataclass(slots=True)
class Measures:
    """Counts of a run's groups.

    Attributes:
        sampled_groups, sampled_tokens: that were rolled out.
        trained_tokens: of groups that were trained.
        wasted_tokens: of groups that were given up.
        staleness: trained tokens by age, in updates between sampling and training.
        seconds: what the trained groups took.
    """

    sampled_groups: int = 0
    sampled_tokens: int = 0
    trained_tokens: int = 0
    wasted_tokens: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def sampled(self, group: Rolled) -> None:
        """Count a group that was rolled out."""
        self.sampled_tokens += group.length
        self.sampled_groups += 1

    def wasted(self, group: Rolled) -> None:
        """Count a group that is given up."""
        self.wasted_tokens += group.length

    def trained(self, group: Rolled, update: int) -> None:
        """Count a group that is trained by an update."""
        self.staleness.update((update - group.versions()).tolist())
        self.trained_tokens += group.length
        self.seconds += group.seconds

    @property
    def waste(self) -> float:
        """Share of what was sampled that was given up, in tokens."""
        return self.wasted_tokens / self.sampled_tokens if self.sampled_tokens else 0.0

    def length_bias(self, *, kept: int) -> float:
        """Return the mean length of ``kept`` groups over that of all sampled ones; 1 if nothing was given up."""
        tokens = self.sampled_tokens - self.wasted_tokens
        given_up = self.sampled_groups - kept
        if not (tokens and kept and given_up > 0):
            return 1.0
        return (tokens / kept) / (self.sampled_tokens / self.sampled_groups)

    def to_json(self) -> JsonObject:
        """Return what a restart goes on from."""
        return {
            "staleness": {str(age): n for age, n in sorted(self.staleness.items())},
            "groups": self.sampled_groups,
            "rolled_seconds": self.seconds,
            "tokens": [self.sampled_tokens, self.trained_tokens, self.wasted_tokens],
        }

    @classmethod
    def from_json(cls, values: JsonObject) -> "Measures":
        """Return measures that go on from there."""
        sampled, trained, wasted = values["tokens"]
        staleness = Counter({int(age): n for age, n in values["staleness"].items()})
        return cls(values.get("groups", 0), sampled, trained, wasted, staleness, values.get("rolled_seconds", 0.0))
