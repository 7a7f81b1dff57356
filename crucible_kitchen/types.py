"""The frozen values of the field: what ports, stages and learners hand to each other.

Knows numpy and nothing of ours. Read next: ``crucible_kitchen.ports``.

Dimension letters, used in docstrings and as suffixes of names: ``T`` tokens of one sequence, ``N`` data of one call,
``B`` rows of one batch, ``V`` vocabulary, ``D`` features of one observation, ``G`` rollouts of one group.

Position ``t`` of every ``[T]`` array of a datum speaks of *predicting* ``target_tokens[t]`` from ``tokens[:t + 1]``:
the shift by one is made once, by :meth:`Datum.from_tokens`, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "OUTPUTS",
    "Acted",
    "AdamParams",
    "Array",
    "BlobRef",
    "Datum",
    "ExportedModel",
    "Float64Array",
    "ForwardBackwardResult",
    "ForwardResult",
    "IntArray",
    "Json",
    "JsonObject",
    "LoraSpec",
    "Loss",
    "LossValue",
    "Message",
    "MlpSpec",
    "ModelVersion",
    "OptimResult",
    "Output",
    "OutputsLoss",
    "OutputsLossValue",
    "Row",
    "Sampled",
    "SamplingParams",
    "SessionInfo",
    "SessionSpec",
    "StateRef",
    "StepResult",
    "reads",
]

Json: TypeAlias = Any
"""A value that JSON can hold: None, bool, int, float, str, a list of them, or a dict of them by str."""

JsonObject: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]
"""One row of a dataset as its source gave it."""

Array: TypeAlias = NDArray[Any]
IntArray: TypeAlias = NDArray[np.int64]
Float64Array: TypeAlias = NDArray[np.float64]

Output: TypeAlias = Literal["logprobs", "values", "entropy", "top_logprobs", "logits"]
"""What a model says at each position of a datum, and what a loss can be a function of.

``logprobs`` [T] of the targets; ``values`` [T] of the value head, after seeing ``tokens[:t + 1]``; ``entropy`` [T] of
the whole distribution, nats; ``top_logprobs`` [T, k] of given tokens, or of the k likeliest; ``logits`` [T, V].
"""

OUTPUTS: tuple[Output, ...] = ("logprobs", "values", "entropy", "top_logprobs", "logits")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """One training example as a backend takes it.

    Attributes:
        inputs: what the model sees, by name. ``tokens`` int64 [T] for language models, ``observations``
            float32 [T, D] for the ``mlp`` policy.
        loss_inputs: what the loss sees, by name, T long: ``target_tokens`` int64 (actions of the ``mlp`` policy),
            ``weights``, ``advantages``, ``logprobs`` float32 [T], and whatever a custom loss needs. Losses of
            ``top_logprobs`` read ``teacher_tokens`` int64 [T, k] and ``teacher_logprobs`` [T, k], those of ``logits``
            ``teacher_logits`` [T, V]: an array, or what ``forward(outputs=("logits",))`` of a teacher gave.
        key: the example's stable name, for error messages and ledgers.
    """

    inputs: Mapping[str, Array]
    loss_inputs: Mapping[str, Array]
    key: str = ""

    @classmethod
    def from_tokens(cls, tokens: Sequence[int] | IntArray, weights: Sequence[float] | Array, key: str = "") -> "Datum":
        """Make a next-token datum from a whole sequence.

        Args:
            tokens: [T + 1] ids of the sequence.
            weights: [T + 1] weight of each token as a *target*; the first has nothing before it and is dropped.
            key: the example's stable name.

        Raises:
            ValueError: the two differ in length or are shorter than two.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        w = np.asarray(weights, dtype=np.float32)
        if ids.ndim != 1 or ids.shape != w.shape or len(ids) < 2:
            raise ValueError(f"tokens and weights must be equal 1-d arrays of two or more, got {ids.shape}, {w.shape}")
        return cls({"tokens": ids[:-1]}, {"target_tokens": ids[1:], "weights": w[1:]}, key)

    def __len__(self) -> int:
        """Return T, the number of positions."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True, eq=False)
class LossValue:
    """What a loss returns.

    Attributes:
        total: the *sum* over the group's positions; never a mean, so that splits add up.
        d_logprobs: d total / d logprobs, float64, one [T] array per datum of the group.
        metrics: sums to report; a key may end in ``:mean``, ``:min`` or ``:max`` to say how calls combine.
    """

    total: float
    d_logprobs: Sequence[Float64Array]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Loss(Protocol):
    """A differentiable loss as one pure numpy function of per-token log-probabilities.

    It is called once per group of ``group`` consecutive datums (1 for losses of single sequences, 2 for pairs), which
    a backend never separates. Every backend can use it: the executor backpropagates ``d_logprobs``; a remote one sends
    a forward, then a cross-entropy backward with weights ``-d_logprobs``.
    """

    @property
    def name(self) -> str:
        """Stable name, for events and manifests."""
        ...

    @property
    def group(self) -> int:
        """How many consecutive datums belong together."""
        ...

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]], /) -> LossValue:
        """Evaluate the loss of one group; both sequences have ``group`` items, arrays are [T]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OutputsLossValue:
    """What a loss of several outputs returns.

    Attributes:
        total: the *sum* over the group's positions.
        slopes: per datum of the group, d total / d output for every output that the loss reads, float64, each of its
            output's shape.
        metrics: as of ``LossValue``.
    """

    total: float
    slopes: Sequence[Mapping[str, Float64Array]]
    metrics: Mapping[str, float] = field(default_factory=dict)


class OutputsLoss(Protocol):
    """A differentiable loss of more than the targets' log-probabilities, as one pure numpy function.

    What it reads must be a capability of the backend. A loss that reads ``logits`` is a sum over positions of single
    datums (``group`` 1): a backend calls it with pieces of a datum, positions of weight 0 left out, so that scores of
    every token at every position are never held at once.
    """

    @property
    def name(self) -> str:
        """Stable name, for events and manifests."""
        ...

    @property
    def group(self) -> int:
        """How many consecutive datums belong together."""
        ...

    @property
    def reads(self) -> frozenset[Output]:
        """The outputs it is a function of."""
        ...

    def __call__(
        self, outputs: Sequence[Mapping[str, Float64Array]], loss_inputs: Sequence[Mapping[str, Array]], /
    ) -> OutputsLossValue:
        """Evaluate the loss of one group; both sequences have ``group`` items."""
        ...


def reads(loss: "str | Loss | OutputsLoss") -> frozenset[Output]:
    """Return the outputs that a loss is a function of; plain losses read log-probabilities."""
    return getattr(loss, "reads", frozenset({"logprobs"}))


@dataclass(frozen=True, slots=True)
class AdamParams:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    ``grad_clip_norm`` clips the global L2 norm of the *scaled* gradient; 0 does not clip.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Low-rank adaptation (Hu et al. 2021): ``W + alpha / rank * B A`` on the target modules.

    ``targets`` empty means every linear layer of attention and MLP.
    """

    rank: int
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """The shape of the model ``mlp``: a policy over observations, and its value network.

    Attributes:
        observation_size: D, features of one observation.
        actions: number of discrete actions.
        hidden: widths of the hidden layers, of policy and value network each.
        activation: between the layers.
    """

    observation_size: int
    actions: int
    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a training session is opened on.

    Attributes:
        model: ``tiny``, a local directory, a hub id, or ``mlp``.
        lora: low-rank adaptation, or None for all weights.
        seed: of initialisation, dropout and sampling.
        directory: where a local backend may keep states; remote ones ignore it. Absolute path.
        run_id: the run it belongs to, for labels at the backend.
        max_length: the longest sequence the run will train on, tokens; 0 means the model's own limit.
        chat_template: a Jinja template that replaces the tokenizer's own.
        value_head: add a head of one number per position, trained, saved and exported with the model: the value
            function of a policy, or the score of a reward model. An export that has one is opened with it.
        reference: keep the weights as they were when the session was opened, for ``forward(reference=True)``. With
            LoRA that is a copy of the adapter, without it a second copy of all weights.
        mlp: the shape of the model ``mlp``; only for it.
    """

    model: str
    lora: LoraSpec | None
    seed: int
    directory: str
    run_id: str = ""
    max_length: int = 0
    chat_template: str | None = None
    value_head: bool = False
    reference: bool = False
    mlp: MlpSpec | None = None


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a session turned out to be.

    ``parameters`` counts all weights, ``trainable_parameters`` those that are trained. ``context_length`` in tokens.
    ``device`` and ``dtype`` are words for people and manifests.
    """

    model: str
    architecture: str
    parameters: int
    trainable_parameters: int
    context_length: int
    vocab_size: int
    hidden_size: int
    lora_rank: int = 0
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ForwardResult:
    """What a model says of datums, in submission order.

    Attributes:
        logprobs: of the targets, one float [T] array per datum; empty if they were not asked for.
        outputs: what else was asked for, by name, one array per datum: ``values`` and ``entropy`` [T],
            ``top_logprobs`` [T, k] with ``top_tokens`` int64 [T, k], the likeliest first, and ``logits`` [T, V]. The
            last need not be in memory: it has ``shape``, slices along T, and becomes an array by ``np.asarray``. It is
            computed when it is read, while its session is open and its weights are the same.
    """

    logprobs: Sequence[Array]
    outputs: Mapping[str, Sequence[Array]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBackwardResult:
    """What one ``forward_backward`` reports.

    Attributes:
        loss: the *sum* over the call's weighted tokens.
        weight: the sum of the weights, that is what a mean divides by.
        tokens: positions computed, padding not counted.
        logprobs: one [T] array per datum, in submission order; empty if the loss does not read them.
        metrics: the loss's own.
        outputs: what else the loss read, but for ``logits``, by name, one array per datum.
    """

    loss: float
    weight: float
    tokens: int
    logprobs: Sequence[Array]
    metrics: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, Sequence[Array]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimResult:
    """What one optimizer step reports: ``step`` after it (the first gives 1), the gradient's norm *before* clipping."""

    step: int
    grad_norm: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateRef:
    """A saved training state (weights, optimizer, RNG) that ``load_state`` restores bit for bit.

    ``uri`` is what the backend gave; it is stored, never rebuilt. ``sha256`` is empty where a backend gives none.
    """

    uri: str
    step: int
    sha256: str = ""
    size: int = 0


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A model written for use elsewhere.

    ``format`` says who reads it: ``peft``, ``transformers``, ``tiny`` or ``noop``. ``files`` are relative to
    ``directory``.
    """

    directory: str
    format: str
    files: tuple[str, ...]
    base_model: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens.

    Attributes:
        max_tokens: at most this many new tokens, 1 or more.
        temperature: 0 takes the likeliest token; 1 samples the model's distribution.
        top_p: keep the smallest set of tokens with at least this probability (1 keeps all).
        top_k: keep the k likeliest tokens (0 keeps all).
        stop: text that ends a sample; it is not part of the sample's text. The model's end token always stops.
        seed: of this request's own generator; sample ``i`` of a request draws from ``(seed, i)``. None takes one
            from the session's generator.
        mode: ``fast`` lets a backend merge requests as it likes; ``deterministic`` asks for the same bits whatever
            else runs.
        raw_logprobs: also report log-probabilities under the model's own distribution (temperature 1, nothing cut).
        top_logprobs: also report so many likeliest tokens of each position under the model's own distribution.
        prompt_logprobs: also report the log-probabilities of the prompt's tokens.
        rescore: replace the samples' ``logprobs`` by those of the training forward pass: bit for bit what
            ``TrainingSession.forward`` gives for the request's samples, prompt included, in one call with the same
            weights. Only for temperature 1 without top-p and top-k.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    mode: Literal["fast", "deterministic"] = "fast"
    raw_logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    rescore: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """One sample.

    Attributes:
        tokens: int64 [T], the end token included if the model produced it.
        logprobs: float32 [T], of each token under the *processed* distribution (temperature, top-p, top-k); 0 at
            temperature 0, where that distribution has one token.
        text: decoded, without end token and stop text.
        stop_reason: ``stop`` (end token or stop text) or ``length``.
        version: optimizer steps behind the weights that produced it.
        raw_logprobs: float32 [T], of each token under the model's own distribution; None unless asked for.
        top_tokens: int64 [T, k], the likeliest tokens under the model's own distribution, the likeliest first; None
            unless asked for.
        top_logprobs: float32 [T, k], theirs.
        prompt_logprobs: float32 [P - 1] of a prompt of P tokens, from the second on; None unless asked for.
    """

    tokens: IntArray
    logprobs: Array
    text: str
    stop_reason: Literal["stop", "length"]
    version: int = 0
    raw_logprobs: Array | None = None
    top_tokens: IntArray | None = None
    top_logprobs: Array | None = None
    prompt_logprobs: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Acted:
    """What a policy did on a batch of observations.

    Attributes:
        actions: int64 [G].
        logprobs: float32 [G], of the actions.
        version: optimizer steps behind the weights.
    """

    actions: IntArray
    logprobs: Array
    version: int = 0


@dataclass(frozen=True, slots=True)
class BlobRef:
    """The address of immutable bytes: ``blob://sha256/<hex>``.

    ``kind`` is the class of content (``weights``, ``report``, ``data``...); rows of datasets live only in ``data``.
    """

    uri: str
    sha256: str
    size: int
    kind: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step as the training stages report it; loss is the mean per weighted token."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_sec: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a registered model.

    Attributes:
        name: the model's name in the registry.
        version: counts from 1 within the name.
        uri: where the weights are, ``blob://sha256/...``.
        stage: ``candidate``, ``staging``, ``production`` or ``archived``.
        lineage: run, recipe, config hash, seed, dataset fingerprint, parent model, code and package versions.
        metrics: what was measured on it.
        created_at: seconds since the epoch, UTC.
        synthetic: made by a noop adapter; promotion refuses it.
    """

    name: str
    version: int
    uri: str
    stage: str = "candidate"
    lineage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    synthetic: bool = False

    @property
    def id(self) -> str:
        """Name and version in one word, as the command line takes it: ``name:version``."""
        return f"{self.name}:{self.version}"
