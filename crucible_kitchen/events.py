"""Every telemetry event: what happened in a run, as frozen values.

An event carries measurements (numbers) and metadata (words), named as in ``crucible-kitchen events --schema``, which
is made from this file. It knows no sink and no store. Read next: ``crucible_kitchen.telemetry``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

__all__ = [
    "EVENTS",
    "AdvantagesComputed",
    "DataPrepared",
    "DistillationStep",
    "DpoDatasetBuilt",
    "DpoEvaluated",
    "DpoStep",
    "EnvGroupBuilt",
    "EvalComplete",
    "Event",
    "EventRecord",
    "GroupDropped",
    "ModelRegistered",
    "PPOUpdated",
    "PipelineMeasured",
    "PolicyEvaluated",
    "RLStep",
    "RolloutComplete",
    "StageErrored",
    "StageStart",
    "StageStop",
    "StallDetected",
    "TrainingCheckpoint",
    "TrainingEpoch",
    "TrainingStep",
    "WarningRaised",
    "WorkflowRolledBack",
    "WorkflowStart",
    "WorkflowStop",
    "event_from_json",
    "event_schema",
]

EVENTS: dict[str, type["Event"]] = {}
"""Every event by its name, in the order of their definition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of all events: ``name`` as upstream, ``measurements`` lists the fields that are numbers to plot."""

    name: ClassVar[str] = ""
    measurements: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        EVENTS[cls.name] = cls  # twice for each: the second is the class with slots

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, without the name."""
        return asdict(self)


class EventRecord(NamedTuple):
    """An event at its place in a run's log.

    Attributes:
        run_id: the run.
        seq: place in the run's log: 1, 2, 3... without gaps.
        time: seconds since the epoch, UTC; for people, never for order.
        event: the event.
    """

    run_id: str
    seq: int
    time: float
    event: Event

    @property
    def terminal(self) -> bool:
        """Whether it is the last event of its attempt."""
        return isinstance(self.event, WorkflowStop)

    def to_json(self) -> dict[str, Any]:
        """Return the record as one flat JSON object, as the JSONL sink and the command line print it."""
        head = {"seq": self.seq, "time": self.time, "run_id": self.run_id, "event": self.event.name}
        return head | self.event.to_json()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowStart(Event):
    """A run's attempt began; ``attempt`` counts from 1."""

    name: ClassVar[str] = "workflow.start"
    recipe: str
    config: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRolledBack(Event):
    """A later attempt went back to a checkpoint, or to the beginning (no ``place``) of a session's block.

    What the log says of that block between ``after`` and this event is superseded: it is executed again.
    """

    name: ClassVar[str] = "workflow.rolled_back"
    session: str
    place: str
    step: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowStop(Event):
    """A run's attempt ended; always the last event. ``duration_s`` in seconds."""

    name: ClassVar[str] = "workflow.stop"
    measurements: ClassVar[tuple[str, ...]] = ("duration_s",)
    recipe: str
    status: str
    duration_s: float
    error: Mapping[str, Any] | None = None
    traceback: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStart(Event):
    """A stage began. ``path`` has the loops' turns in it; ``attempt`` counts from 1."""

    name: ClassVar[str] = "stage.start"
    stage: str
    recipe: str
    path: str
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStop(Event):
    """A stage ended well. ``duration_s`` in seconds, all attempts together."""

    name: ClassVar[str] = "stage.stop"
    measurements: ClassVar[tuple[str, ...]] = ("duration_s",)
    stage: str
    recipe: str
    path: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageErrored(Event):
    """An attempt of a stage failed; ``action``: what follows, ``retry``, ``skip`` or ``halt``; ``traceback``: where."""

    name: ClassVar[str] = "stage.error"
    measurements: ClassVar[tuple[str, ...]] = ("duration_s",)
    stage: str
    recipe: str
    path: str
    attempt: int
    code: str
    message: str
    action: str
    duration_s: float = 0.0
    traceback: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class StallDetected(Event):
    """Nothing moved for ``stalled_s`` seconds; ``culprit`` says what everything waits for, ``waits`` all who wait."""

    name: ClassVar[str] = "run.stalled"
    measurements: ClassVar[tuple[str, ...]] = ("stalled_s",)
    stalled_s: float
    culprit: str
    policy: str
    waits: Sequence[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPrepared(Event):
    """A dataset was rendered into tokens. ``truncated`` counts rows cut at the context."""

    name: ClassVar[str] = "data.prepared"
    measurements: ClassVar[tuple[str, ...]] = ("rows", "tokens", "trained_tokens", "truncated", "steps")
    dataset: str
    fingerprint: str
    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep(Event):
    """One optimizer step: mean loss per weighted token, learning rate, throughput, gradient norm before clipping.

    An update of a policy, which may be several steps, is reported once: by its last one.
    """

    name: ClassVar[str] = "training.step"
    measurements: ClassVar[tuple[str, ...]] = ("loss", "lr", "tokens_per_sec", "grad_norm")
    step: int
    epoch: int
    loss: float
    lr: float
    tokens_per_sec: float
    grad_norm: float
    total_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEpoch(Event):
    """An epoch ended; ``avg_loss`` is the mean of its steps' losses."""

    name: ClassVar[str] = "training.epoch"
    measurements: ClassVar[tuple[str, ...]] = ("avg_loss",)
    epoch: int
    steps: int
    avg_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCheckpoint(Event):
    """A training state was saved at ``path``."""

    name: ClassVar[str] = "training.checkpoint"
    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalComplete(Event):
    """An evaluation ended. Metrics are over ``sample_count`` held-out rows."""

    name: ClassVar[str] = "eval.complete"
    measurements: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "precision", "recall")
    step: int
    sample_count: int
    accuracy: float
    f1: float
    precision: float
    recall: float
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoDatasetBuilt(Event):
    """Comparisons were rendered: pairs (or single answers) kept, and those left out, by reason in ``flaws``."""

    name: ClassVar[str] = "dpo.dataset_built"
    measurements: ClassVar[tuple[str, ...]] = ("num_pairs", "num_batches", "dropped", "truncated")
    num_pairs: int
    num_batches: int
    batch_size: int
    dropped: int = 0
    truncated: int = 0
    flaws: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoStep(Event):
    """One optimizer step on comparisons: means over its pairs (single answers with ``kto``)."""

    name: ClassVar[str] = "dpo.step"
    measurements: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "chosen_reward", "rejected_reward", "margin")
    step: int
    loss: float
    accuracy: float
    chosen_reward: float
    rejected_reward: float
    margin: float
    beta: float
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoEvaluated(Event):
    """Held-out comparisons were scored: means over ``num_pairs`` of them."""

    name: ClassVar[str] = "dpo.evaluated"
    measurements: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "chosen_reward", "rejected_reward", "margin")
    step: int
    loss: float
    accuracy: float
    chosen_reward: float
    rejected_reward: float
    margin: float
    num_pairs: int
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationStep(Event):
    """One optimizer step of distillation.

    ``divergence`` is nats per token between teacher and student, by the method: an estimate of the reverse KL from
    samples (``on_policy``), the loss itself (``off_policy``), the forward KL on the teacher's top tokens (``top_k``),
    the generalised JSD (``gjsd``).
    """

    name: ClassVar[str] = "distillation.step"
    measurements: ClassVar[tuple[str, ...]] = ("loss", "divergence", "samples", "tokens")
    step: int
    method: str
    loss: float
    divergence: float
    samples: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRegistered(Event):
    """A model version was registered; ``model_name`` is the name that upstream calls ``name``."""

    name: ClassVar[str] = "model.registered"
    model_id: str
    model_name: str
    version: int
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvGroupBuilt(Event):
    """The environments are ready to be rolled out. ``env_type`` is the environment's name, ``problems`` how many.

    ``learner`` is ``streaming`` or ``batch``, ``because`` says why.
    """

    name: ClassVar[str] = "rl.env_group_built"
    measurements: ClassVar[tuple[str, ...]] = ("group_size", "groups_per_batch")
    group_size: int
    groups_per_batch: int
    env_type: str
    problems: int = 0
    fingerprint: str = ""
    learner: str = ""
    because: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutComplete(Event):
    """All rollouts of one update are there. Rewards are of the episodes that ended, or so far if none did.

    ``groups`` are their indices of drawing; trajectories that the next group goes on with are not in ``num_ended``.
    ``outcomes`` counts by kind, failed members of trained groups included; ``env_seconds`` and ``sampling_seconds`` are
    summed over members, ``seconds`` has what each group took.
    """

    name: ClassVar[str] = "rl.rollout_complete"
    measurements: ClassVar[tuple[str, ...]] = (
        "reward_mean",
        "reward_std",
        "num_trajectories",
        "num_ended",
        "tokens_mean",
        "env_seconds",
        "sampling_seconds",
    )
    reward_mean: float
    reward_std: float
    num_trajectories: int
    num_ended: int
    tokens_mean: float
    env_seconds: float
    sampling_seconds: float
    rollout_index: int
    groups: Sequence[int] = ()
    seconds: Sequence[float] = ()
    outcomes: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantagesComputed(Event):
    """Advantages and returns of one update, over the ``num_steps`` positions where the policy acted."""

    name: ClassVar[str] = "rl.advantages_computed"
    measurements: ClassVar[tuple[str, ...]] = (
        "advantage_mean",
        "advantage_std",
        "return_mean",
        "return_std",
        "num_steps",
    )
    advantage_mean: float
    advantage_std: float
    return_mean: float
    return_std: float
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOUpdated(Event):
    """One pass over a batch. Losses as the optimizer saw them; entropy and KL in nats per token."""

    name: ClassVar[str] = "rl.ppo_update"
    measurements: ClassVar[tuple[str, ...]] = (
        "policy_loss",
        "value_loss",
        "entropy",
        "clip_fraction",
        "kl_divergence",
    )
    policy_loss: float
    value_loss: float
    entropy: float
    clip_fraction: float
    kl_divergence: float
    epoch: int
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RLStep(Event):
    """One update of the policy, all passes together. ``step`` counts updates from 1.

    ``sampler_mismatch`` is the greatest difference, in nats, between a token's log-probability as its sampler gave it
    and as the training pass computes it, over what the policy that is updated sampled itself; where that is nothing,
    what the update before found.
    """

    name: ClassVar[str] = "rl.step"
    measurements: ClassVar[tuple[str, ...]] = (
        "reward_mean",
        "policy_loss",
        "entropy",
        "clip_fraction",
        "sampler_mismatch",
    )
    reward_mean: float
    policy_loss: float
    entropy: float
    clip_fraction: float
    sampler_mismatch: float = math.nan
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineMeasured(Event):
    """How rollouts and learning overlap, from the start of the run to this update.

    Staleness in updates, per token; ``waste`` and ``length_bias`` as shares of what was sampled; ``learner_seconds``
    and ``worker_seconds`` give every second one cause; ``slowest`` is the group that has been out
    longest, -1 if none is out.
    """

    name: ClassVar[str] = "rl.pipeline"
    measurements: ClassVar[tuple[str, ...]] = (
        "overlap_efficiency",
        "learner_idle_share",
        "queue_depth",
        "in_flight",
        "staleness_mean",
        "staleness_max",
        "waste",
        "length_bias",
    )
    overlap_efficiency: float
    learner_idle_share: float
    queue_depth: int
    in_flight: int
    staleness_mean: float
    staleness_max: int
    waste: float
    length_bias: float
    step: int
    slowest: int = -1
    staleness: Mapping[str, int] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    learner_seconds: Mapping[str, float] = field(default_factory=dict)
    worker_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDropped(Event):
    """A group was given up: nothing of it is trained. ``index`` is that of its drawing."""

    name: ClassVar[str] = "rl.group_dropped"
    index: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEvaluated(Event):
    """The policy was rolled out greedily on ``episodes`` problems; ``held_out``: they are never trained on."""

    name: ClassVar[str] = "rl.evaluated"
    measurements: ClassVar[tuple[str, ...]] = ("reward_mean", "reward_std", "episodes")
    reward_mean: float
    reward_std: float
    episodes: int
    step: int
    held_out: bool = True
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarningRaised(Event):
    """Something a person should know, though the run goes on."""

    name: ClassVar[str] = "warning"
    code: str
    message: str
    path: str = ""


def event_from_json(name: str, values: Mapping[str, Any]) -> Event:
    """Rebuild an event from its name and fields; unknown fields (of a newer version) are left out.

    Raises:
        KeyError: no event has this name.
    """
    cls = EVENTS[name]
    known = {f.name for f in fields(cls)}
    return cls(**{k: v for k, v in values.items() if k in known})


def event_schema() -> list[dict[str, Any]]:
    """Return every event with its fields, measurements first, as ``events --schema`` prints it."""
    rows = []
    for name, cls in EVENTS.items():
        metadata = [f.name for f in fields(cls) if f.name not in cls.measurements]
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        rows.append(
            {
                "event": name,
                "measurements": list(cls.measurements),
                "metadata": metadata,
                "required": required,
                "doc": (cls.__doc__ or "").strip(),
            }
        )
    return rows
