"""The shared parts that every workflow's config is built from, by inheritance.

Each part is frozen and closed (an unknown key is an error that names the nearest key); keys are flat, have one name
everywhere, and are documented once, here, under their field. A stage names the smallest part it needs. Knows nothing
of workflows. Read next: ``crucible_kitchen.workflows``.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.types import AdamParams, LoraSpec

if TYPE_CHECKING:
    from crucible_kitchen.ports import TrainingCapabilities

__all__ = [
    "AdamConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "HeldOutConfig",
    "ModelConfig",
    "OptimConfig",
    "RegistryConfig",
    "RunConfig",
    "build_config",
    "config_hash",
    "refuse_unused",
]

C = TypeVar("C", bound="RunConfig")


class RunConfig(BaseModel):
    """What every run has."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    seed: int = Field(default=0, ge=0)
    """Seed of everything random in the run: initialisation, shuffling, dropout, sampling."""

    stage_timeout: float | None = Field(default=3600.0, gt=0)
    """Seconds a stage may take, a resource its opening, a checkpoint its saving or loading. Loops have none."""

    grace: float = Field(default=30.0, gt=0)
    """Seconds a resource gets to close before it is cancelled."""

    stall_after: float = Field(default=600.0, ge=0)
    """Seconds without any movement after which the run tells what everything waits for; 0 never does."""

    on_stall: Literal["warn", "abort"] = "warn"
    """``abort``: a run that stalls ends as failed, with what it waited for."""

    durability: Literal["sync", "behind"] = "sync"
    """``sync``: a stage's record is on disk before the next stage begins. ``behind``: at most 100 ms later."""

    on_failure: Literal["keep", "rollback"] = "keep"
    """``rollback``: when the run fails, stages that offer a compensation are compensated, newest first."""

    def unrepeatable(self) -> str | None:
        """Return why equal seeds may give other bits under these settings; None if they do not."""
        return None

    def decided(self, can: "TrainingCapabilities") -> Mapping[str, str]:  # noqa: ARG002 - what depends on it says so
        """Return what no key says, but follows from the keys and from what the backend can do: each with its reason."""
        return {}


class ModelConfig(RunConfig):
    """Which model is trained, and which of its weights."""

    model: str
    """``tiny`` (built in), a local directory, a GGUF file, or a hub id."""

    lora_rank: int | None = Field(default=None, ge=0)
    """Rank of the LoRA adapters; 0 trains all weights. Unset: 0 for ``tiny`` and ``mlp``, 16 for others."""

    lora_alpha: float = Field(default=32.0, gt=0)
    """LoRA's numerator: updates are scaled by ``lora_alpha / lora_rank``."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on LoRA's input."""

    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get adapters; empty: all linear layers of attention and MLP."""

    chat_template: str | None = None
    """A Jinja chat template, or the path of a file with one, in place of the tokenizer's own."""

    def lora(self) -> LoraSpec | None:
        """Return the LoRA to train, or None for all weights."""
        rank = self.lora_rank if self.lora_rank is not None else (0 if self.model in ("tiny", "mlp") else 16)
        return LoraSpec(rank, self.lora_alpha, self.lora_dropout, self.lora_targets) if rank else None


class DataConfig(RunConfig):
    """Which rows are trained on, and how they become tokens."""

    dataset: str
    """A built-in task (``sums``), a file (JSONL, Parquet, CSV), a directory, or a hub id."""

    split: str = "train"
    """The split to train on."""

    dataset_size: int = Field(default=0, ge=0)
    """At most this many training rows; 0 for all (built-in tasks: their own default)."""

    dataset_options: dict[str, str] = Field(default_factory=dict)
    """The source's own options, for instance ``{"difficulty": "2"}`` of a built-in task."""

    holdout: float = Field(default=0.1, ge=0)
    """Share (below 1) or number of rows held out for evaluation when the source has one split only."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Which of the row's fields is meant, for rows of another shape: ``{"prompt": "question", ...}``."""

    system_prompt: str = ""
    """Put before every conversation that has no system message."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """``chat`` wraps prompts in the chat template; ``plain`` does not; ``auto``: as the model is meant to be used."""

    train_on: Literal["last_assistant_message", "all_assistant_messages", "all_messages", "all_tokens"] = (
        "last_assistant_message"
    )
    """Which tokens count in the loss."""

    max_length: int = Field(default=2048, ge=2)
    """Longest sequence in tokens; the model's own limit wins if it is shorter."""

    on_too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to longer sequences: cut at the end and counted, left out and counted, or refused."""

    shuffle: bool = True
    """Shuffle the rows anew in every epoch (seeded by ``seed`` and the epoch)."""

    batch_size: int = Field(default=64, ge=1)
    """Rows per forward and backward; times ``gradient_accumulation`` rows per optimizer step."""

    gradient_accumulation: int = Field(default=1, ge=1)
    """How many batches' gradients are added up for one optimizer step."""


class AdamConfig(RunConfig):
    """How large a step is: the optimizer and its learning rate."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; unset: recommended from the model's size and LoRA."""

    lr_schedule: Literal["constant", "linear", "cosine", "polynomial", "exponential"] = "linear"
    """Course of the learning rate after warm-up."""

    lr_end: float = Field(default=0.0, ge=0, le=1)
    """Where the schedule ends, as a share of the peak (``exponential`` needs more than 0)."""

    lr_power: float = Field(default=2.0, gt=0)
    """Exponent of the polynomial schedule."""

    warmup: float = Field(default=0.0, ge=0)
    """Warm-up: a share of all steps if below 1, a number of steps otherwise."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""

    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the second moment."""

    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""

    grad_clip_norm: float = Field(default=1.0, ge=0)
    """Largest gradient norm, after scaling; 0 does not clip."""

    def adam(self, learning_rate: float) -> AdamParams:
        """Return the optimizer's parameters at this learning rate."""
        return AdamParams(learning_rate, self.beta1, self.beta2, self.eps, self.weight_decay, self.grad_clip_norm)

    @model_validator(mode="after")
    def _exponential_needs_an_end(self) -> Self:
        if self.lr_schedule == "exponential" and self.lr_end == 0:
            raise ValueError("lr_schedule=exponential needs lr_end above 0, for instance lr_end=0.1")
        return self


class OptimConfig(AdamConfig):
    """How long rows are trained on, and how the weights are updated."""

    epochs: int = Field(default=1, ge=0)
    """Passes over the data."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps; unset: as many as the epochs give."""


class CheckpointConfig(RunConfig):
    """When checkpoints are taken, and which are kept."""

    save_every: int = Field(default=100, ge=0)
    """Take a checkpoint every so many optimizer steps, and when training is done; 0: only when the run is paused."""

    keep_last: int = Field(default=2, ge=1)
    """So many newest checkpoints are kept."""

    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of so many steps are kept besides; 0: none for that reason."""

    keep_best: int = Field(default=0, ge=0)
    """So many checkpoints with the best accuracy are kept besides; only those that were evaluated have one."""


class HeldOutConfig(RunConfig):
    """When a model is measured on rows it was not trained on, and what follows from it."""

    eval_split: str = ""
    """The split to evaluate on; unset: ``test``, then ``validation``, then the held-out share."""

    eval_size: int = Field(default=200, ge=1)
    """At most this many rows are evaluated."""

    eval_every: int = Field(default=0, ge=0)
    """Also evaluate every so many optimizer steps; 0: only at the end."""

    eval_at_start: bool = False
    """Also evaluate before the first step."""

    early_stopping: int = Field(default=0, ge=0)
    """Stop after so many evaluations without a better accuracy; 0 never stops early."""

    save_best: bool = False
    """Keep the state with the best accuracy and finish with it; needs ``eval_every``."""

    @model_validator(mode="after")
    def _needs_evaluations(self) -> Self:
        if (self.save_best or self.early_stopping) and not self.eval_every:
            raise ValueError("save_best and early_stopping need eval_every")
        return self


class EvalConfig(HeldOutConfig):
    """How a model is asked held-out questions."""

    eval_max_tokens: int = Field(default=64, ge=1)
    """Longest answer that is generated."""

    eval_labels: tuple[str, ...] = ()
    """Candidate labels: the likeliest is the answer; empty: the answer is generated and compared."""

    eval_average: Literal["macro", "micro", "weighted"] = "macro"
    """Which average ``precision``, ``recall`` and ``f1`` stand for."""


class RegistryConfig(RunConfig):
    """Under which name the trained model is registered."""

    register_as: str = ""
    """The model's name in the registry; unset: ``<workflow>-<model>-<dataset>``."""

    parent_model: str = Field(default="", pattern=r"^(.+:[^:]+)?$")
    """The registered version that this one grew out of, ``name:version``."""


def refuse_unused(config: RunConfig, choice: str, uses: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse keys with other values than their defaults that the method chosen would not read; call it in a validator.

    A config that was stored has all keys, so it is values that count, not which keys were given.

    Args:
        config: what was given.
        choice: the key that chooses the method.
        uses: for each key that some methods read only, those methods.

    Raises:
        ValueError: naming the key and the methods it belongs to.
    """
    chosen = getattr(config, choice)
    for key, methods in uses.items():
        changed = getattr(config, key) != type(config).model_fields[key].default
        if changed and chosen not in methods:
            raise ValueError(f"{key} has no meaning for {choice}={chosen}; it belongs to {', '.join(methods)}")


def build_config(cls: type[C], values: Mapping[str, Any]) -> C:
    """Validate values into a config.

    Raises:
        ConfigError: naming every bad key, the nearest good one, and the type expected.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        problems = [_problem(cls, dict(e)) for e in error.errors(include_url=False, include_context=False)]
        hints = [hint for _, hint in problems if hint]
        raise ConfigError("; ".join(text for text, _ in problems), hint="; ".join(hints) or None) from None


def _problem(cls: type[BaseModel], error: dict[str, Any]) -> tuple[str, str | None]:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, cls.model_fields, n=1)
        return (
            f"unknown config key {key!r}",
            f"did you mean {near[0]!r}?" if near else f"keys: {', '.join(cls.model_fields)}",
        )
    if error["type"] == "missing":
        field = cls.model_fields.get(key)
        return f"config key {key!r} is missing", f"{key}: {field.description}" if field and field.description else None
    message = error["msg"].removeprefix("Value error, ")
    return (f"config key {key!r}: {message}" if key else message), None


def config_hash(config: BaseModel) -> str:
    """Return the sha256 (hex) of a config's canonical JSON: the same settings have the same hash everywhere."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
