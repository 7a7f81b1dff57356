"""The config parts of reinforcement learning: how rollouts are made, and how they are learned from.

A key that the chosen method does not use is refused when it is set to anything but its default. Read next:
``crucible_kitchen.workflows.reinforcement``.
"""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from crucible_kitchen.config import RunConfig
from crucible_kitchen.learner import Aggregation, Normalization, StdConvention
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.rl.staleness import StalenessPolicy

__all__ = ["LearnerConfig", "RolloutConfig"]

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "centred", "maxrl"]
PolicyLoss = Literal["ppo", "importance_sampling", "cispo", "gspo", "decoupled_ppo"]


class RolloutConfig(RunConfig):
    """What is rolled out, how much of it, and how far ahead of the learner."""

    env: str
    """An environment by name, with its task if it has some: ``sums``, ``gymnasium:CartPole-v1``."""

    env_options: dict[str, str] = Field(default_factory=dict)
    """The environment's own options, for instance ``{"difficulty": "1"}`` of ``sums``."""

    group_size: int = Field(default=4, ge=1)
    """Rollouts of one problem."""

    min_group_size: int = Field(default=0, ge=0)
    """Members a group needs when others failed, to be trained at all; 0: two (one with ``advantage=gae``)."""

    groups_per_batch: int = Field(default=8, ge=1)
    """Problems of one update."""

    num_rollouts: int = Field(default=100, ge=1)
    """Batches in all: so many updates are made."""

    concurrent_groups: int = Field(default=0, ge=0)
    """Groups that are rolled out at a time; 0: ``groups_per_batch``."""

    max_staleness: int = Field(default=0, ge=0)
    """Updates that may lie between sampling and training; 0 rolls out and learns in turn, more lets both overlap."""

    staleness_policy: StalenessPolicy = "aggregate"
    """``aggregate`` bounds the mean, ``block`` every group by waiting, ``discard`` and ``cancel`` by giving up."""

    sampling: Literal["fast", "deterministic"] = "fast"
    """``deterministic``: the same bits whatever else runs; ``fast`` merges requests as it likes."""

    temperature: float = Field(default=1.0, gt=0)
    """Of sampling. Learning refers to the model's own distribution, whatever it is sampled with."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with at least this probability."""

    top_k: int = Field(default=0, ge=0)
    """Keep so many likeliest tokens; 0 keeps all."""

    max_tokens: int = Field(default=64, ge=1)
    """Longest turn of the policy, tokens."""

    max_turns: int = Field(default=1000, ge=1)
    """Episodes are cut after so many turns or steps."""

    horizon: int = Field(default=0, ge=0)
    """Steps of a group in a vector environment, which goes on where it stopped; 0: one episode of each member."""

    rollout_timeout: float = Field(default=600.0, gt=0)
    """Seconds the rollout of a group may take; members that are not done by then are a timeout, never a reward."""

    rollout_attempts: int = Field(default=2, ge=1)
    """How often a member is rolled out before its fault counts, and how many actors a problem may kill."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """``chat`` wraps prompts in the chat template; ``plain`` does not; ``auto``: as the model is meant to be used."""

    shuffle: bool = True
    """Draw problems in a seeded order, anew for every pass; else in the environment's own."""

    @model_validator(mode="after")
    def _one_goes_on(self) -> Self:
        if self.horizon and (self.groups_per_batch != 1 or self.concurrent_groups > 1):
            raise ValueError(
                "with horizon one environment goes on: set groups_per_batch=1, and group_size to its copies"
            )
        return self

    def unrepeatable(self) -> str | None:
        """See ``RunConfig``."""
        if self.max_staleness:
            return f"rollouts overlap with learning (max_staleness={self.max_staleness}): set it to 0"
        if self.sampling == "fast" and getattr(self, "model", "") != "mlp":
            return "sampling=fast merges requests as they come: set sampling=deterministic"
        return super().unrepeatable()


_OF_GAE = ("gamma", "gae_lambda", "value_lambda", "value_coef", "value_clip", "normalize_values")
_OF_LOSS = {
    "clip_epsilon": ("ppo", "gspo", "decoupled_ppo"),
    "clip_epsilon_high": ("ppo", "gspo", "decoupled_ppo"),
    "dual_clip": ("ppo", "gspo", "decoupled_ppo"),
    "ratio_min": ("cispo",),
    "ratio_max": ("cispo",),
    "behaviour_cap": ("decoupled_ppo",),
}


class LearnerConfig(RunConfig):
    """How rollouts are learned from."""

    advantage: Advantage = "gae"
    """``gae`` learns a value function; the others compare the rollouts of one problem with each other."""

    advantage_std: StdConvention = "trl"
    """What ``advantage=grpo`` divides by, named after who divides so."""

    gamma: float = Field(default=0.99, ge=0, le=1)
    """Discount per step, with ``advantage=gae``."""

    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda, of the advantages."""

    value_lambda: float = Field(default=1.0, ge=0, le=1)
    """Lambda of the returns that values learn; 1: sums of rewards to the end of an episode, or to its cut."""

    normalize: Normalization = "none"
    """Whiten advantages over each group, the batch, or all seen so far (``running``)."""

    loss: PolicyLoss = "ppo"
    """The policy's loss."""

    clip_epsilon: float | None = Field(default=None, ge=0)
    """How far the probability ratio may move from 1; unset: 0.2, with ``loss=gspo`` 3e-4 down and 4e-4 up."""

    clip_epsilon_high: float | None = Field(default=None, ge=0)
    """Upwards; unset: as ``clip_epsilon``."""

    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of negative advantages, as a ratio; unset: none."""

    ratio_min: float = Field(default=0.0, ge=0)
    """CISPO's lower bound of the ratio."""

    ratio_max: float = Field(default=4.0, gt=0)
    """CISPO's upper bound of the ratio."""

    behaviour_cap: float = Field(default=5.0, gt=0)
    """``decoupled_ppo``: positions whose proximal policy differs more from the sampling one are left out."""

    aggregation: Literal["auto"] | Aggregation = "auto"
    """What a token counts for; ``auto``: as the method has it, else every token the same."""

    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh tokens by how the trainer's numbers differ from the sampler's, at most by this; unset: not."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the model as it was at the start."""

    kl_in: Literal["reward", "loss"] = "reward"
    """Where it counts."""

    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    value_coef: float = Field(default=0.5, gt=0)
    """Weight of the value loss."""

    value_clip: float | None = Field(default=None, gt=0)
    """How far values may move from the old ones within an update, in the units that they learn in; unset: freely."""

    normalize_values: bool | None = None
    """Learn values in units of the first update's returns; unset: if an update takes more than one optimizer step."""

    ppo_epochs: int = Field(default=1, ge=1)
    """Passes over a batch."""

    minibatches: int = Field(default=1, ge=1)
    """Parts of a batch, each an optimizer step."""

    learner: Literal["auto", "streaming", "batch"] = "auto"
    """``streaming`` computes each group's gradient as it arrives; ``batch`` waits for all; ``auto``: whichever can."""

    @property
    def group_relative(self) -> bool:
        """Whether advantages compare the members of a group."""
        return self.advantage != "gae"

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps of one batch."""
        return self.ppo_epochs * self.minibatches

    @property
    def normalizes_values(self) -> bool:
        """Whether values are learned in units of the first update's returns."""
        if self.normalize_values is not None:
            return self.normalize_values
        return not self.group_relative and self.steps_per_update > 1

    @property
    def weighting(self) -> Aggregation:
        """What a token counts for."""
        if self.aggregation != "auto":
            return self.aggregation
        if self.loss == "gspo":
            return "sequence_mean"
        return "dr_grpo" if self.advantage == "dr_grpo" else "token_mean"

    def must_batch(self) -> str | None:
        """Return why the gradient of a group cannot be computed before the batch is complete; None if it can."""
        if self.steps_per_update > 1:
            return "ppo_epochs and minibatches need the whole batch"
        if self.normalize == "batch":
            return "normalize=batch needs the whole batch"
        if self.normalizes_values:
            return "normalize_values needs the whole batch"
        return None

    def batch_because(self, can: TrainingCapabilities) -> str | None:
        """Return why a batch is collected before it is learned from; None if groups are taken as they arrive."""
        if self.learner == "batch":
            return "learner=batch"
        if can.step_scale != "exact":
            return "the backend cannot scale a step by a number known only then"
        return self.must_batch()

    def decided(self, can: TrainingCapabilities) -> Mapping[str, str]:
        """See ``RunConfig``: the learner."""
        why = self.batch_because(can)
        return {
            "learner": "batch" if why else "streaming",
            "learner_because": why or "each group's gradient depends on that group alone",
        }

    def _changed(self, key: str) -> bool:
        """Return whether a key has another value than its default: a config that was stored has them all."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key in _OF_GAE:
            if self.group_relative and self._changed(key):
                raise ValueError(f"{key} belongs to advantage=gae; advantage={self.advantage} does not use it")
        if self._changed("advantage_std") and self.advantage != "grpo":
            raise ValueError("advantage_std belongs to advantage=grpo")
        for key, losses in _OF_LOSS.items():
            if self._changed(key) and self.loss not in losses:
                raise ValueError(f"{key} belongs to loss={' or '.join(losses)}; loss={self.loss} does not use it")
        if self.ratio_min > self.ratio_max:
            raise ValueError("ratio_min is above ratio_max")
        if self._changed("kl_in") and not self.kl_coef:
            raise ValueError("kl_in has no meaning without kl_coef")
        if self.learner == "streaming" and (why := self.must_batch()):
            raise ValueError(f"learner=streaming is not possible: {why}; use learner=batch")
        return self
