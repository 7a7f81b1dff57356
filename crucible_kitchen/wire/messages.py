"""What server and client say to each other, one class per message; unknown fields are ignored, as the profile asks.

Fields named ``crucible`` are our own: whoever does not know them loses nothing but what they ask for. Read next:
``crucible_kitchen.wire.codec``.
"""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from crucible_kitchen.types import JsonObject

__all__ = [
    "MOST_REQUESTS",
    "PREFIX",
    "VERSION",
    "AccumulationExtension",
    "AdamFields",
    "Chunk",
    "CreateModel",
    "CreateSamplingSession",
    "CreateSession",
    "Forward",
    "ForwardBackward",
    "ForwardBackwardInput",
    "ForwardExtension",
    "LoadWeights",
    "LoraConfig",
    "ModelExtension",
    "ModelInput",
    "OptimStep",
    "RetrieveFuture",
    "Sample",
    "SampleBatch",
    "SampleExtension",
    "SamplingFields",
    "SaveWeights",
    "SaveWeightsForSampler",
    "SessionExtension",
    "TensorData",
    "WireDatum",
    "WireMessage",
]

PREFIX = "/api/v1/"
"""Every path of the wire begins with it."""

VERSION = 1
"""Of our extensions."""

MOST_REQUESTS = 4096
"""Requests in one batch."""


class WireMessage(BaseModel):
    """A message: frozen, unknown fields ignored."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="ignore", protected_namespaces=(), ser_json_inf_nan="constants"
    )


class TensorData(WireMessage):
    """A tensor as a flat list; ``shape`` None is that of the list."""

    data: list[Any]
    dtype: str
    shape: list[StrictInt] | None = None
    sparse_crow_indices: list[Any] | None = None
    sparse_col_indices: list[Any] | None = None


class Chunk(WireMessage):
    """A part of a model's input; we know ``encoded_text``."""

    type: str = "encoded_text"
    tokens: list[Any] = []


class ModelInput(WireMessage):
    """A model's input: chunks one after another."""

    chunks: list[Chunk]


class WireDatum(WireMessage):
    """One training example."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = {}


class LoraConfig(WireMessage):
    """The low-rank adaptation of a model, in the profile's words."""

    rank: StrictInt = Field(ge=1)
    alpha: float = 32.0
    seed: StrictInt | None = None
    train_mlp: StrictBool = True
    train_attn: StrictBool = True
    train_unembed: StrictBool = True


class CreateSession(WireMessage):
    """``create_session``: what its client is."""

    tags: list[str] = []
    user_metadata: JsonObject | None = None
    sdk_version: str = ""


class SessionExtension(WireMessage):
    """What a server of ours says when a session was created: that it knows these extensions."""

    version: StrictInt


class ModelExtension(WireMessage):
    """What the profile cannot say about a new model.

    Attributes:
        seed: of everything random, where all weights train.
        dropout, targets: of the low-rank adaptation.
        chat_template: in place of the tokenizer's own.
        max_length: the longest sequence that will be trained on.
        reference: keep the weights as they are created, for ``forward``.
    """

    seed: StrictInt = 0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = []
    chat_template: str | None = None
    max_length: StrictInt = 0
    reference: StrictBool = False


class CreateModel(WireMessage):
    """``create_model``: a model to train; without ``lora_config`` all its weights."""

    session_id: str
    model_seq_id: StrictInt
    base_model: str
    lora_config: LoraConfig | None = None
    crucible: ModelExtension | None = None


class AccumulationExtension(WireMessage):
    """Which accumulation a call belongs to; another one than the open one drops that.

    Attributes:
        step: of which optimizer step.
        attempt: which try of it.
        order: place of this gradient in the sum.
        keys: names of the data, for messages of errors.
        scale: what an optimizer step multiplies its gradient by.
    """

    step: StrictInt
    attempt: StrictInt = 0
    order: StrictInt | None = None
    keys: list[str] | None = None
    scale: float = 1.0


class ForwardExtension(WireMessage):
    """What the profile cannot ask of a forward.

    Attributes:
        reference: compute under the weights that the model was created with.
        keys: names of the data, for messages of errors.
    """

    reference: StrictBool = False
    keys: list[str] | None = None


class ForwardBackwardInput(WireMessage):
    """Data and what to compute of them."""

    data: list[WireDatum]
    loss_fn: str
    loss_fn_config: dict[str, float] | None = None


class ForwardBackward(WireMessage):
    """``forward_backward``: add the gradient of a sum."""

    forward_backward_input: ForwardBackwardInput
    crucible: AccumulationExtension | None = None


class Forward(WireMessage):
    """``forward``: log-probabilities only."""

    forward_input: ForwardBackwardInput
    crucible: ForwardExtension | None = None


class AdamFields(WireMessage):
    """AdamW in the profile's words and with its defaults."""

    learning_rate: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    grad_clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class OptimStep(WireMessage):
    """``optim_step``: apply what was accumulated."""

    adam_params: AdamFields
    crucible: AccumulationExtension | None = None


class SaveWeights(WireMessage):
    """``save_weights``: weights, optimizer and random state under a name."""

    path: str
    overwrite: StrictBool = False


class LoadWeights(WireMessage):
    """``load_weights``: restore what ``save_weights`` saved; without ``optimizer`` only the weights."""

    path: str
    optimizer: StrictBool


class SaveWeightsForSampler(WireMessage):
    """``save_weights_for_sampler``: weights without a name are as long-lived as the model, and opened for sampling."""

    path: str | None = None
    sampling_session_seq_id: StrictInt | None = None


class CreateSamplingSession(WireMessage):
    """``create_sampling_session``: sample from saved weights or a base model."""

    session_id: str
    sampling_session_seq_id: StrictInt
    base_model: str | None = None
    model_path: str | None = None


class SamplingFields(WireMessage):
    """How to draw tokens, in the profile's words; ``top_k`` -1 keeps all."""

    max_tokens: StrictInt | None = None
    seed: StrictInt | None = None
    stop: str | list[str] | list[StrictInt] | None = None
    temperature: float = Field(default=1.0, allow_inf_nan=False)
    top_k: StrictInt = -1
    top_p: float = Field(default=1.0, allow_inf_nan=False)


class SampleExtension(WireMessage):
    """What the profile cannot ask of a sampler.

    Attributes:
        score: sequences to compute log-probabilities of, instead of sampling.
        mode, raw_logprobs, top_logprobs, rescore: see ``SamplingParams``.
    """

    score: list[list[StrictInt]] | None = None
    mode: Literal["fast", "deterministic"] = "fast"
    raw_logprobs: StrictBool = False
    top_logprobs: StrictInt = 0
    rescore: StrictBool = False


class Sample(WireMessage):
    """``asample``: draw from the weights of a sampling session."""

    num_samples: StrictInt = Field(default=1, ge=1, le=4096)
    prompt: ModelInput
    sampling_params: SamplingFields = SamplingFields()
    prompt_logprobs: StrictBool | None = None
    topk_prompt_logprobs: StrictInt = 0
    crucible: SampleExtension | None = None


class SampleBatch(WireMessage):
    """``asample_batch``, an extension: requests to one sampling session, and a wait for answers to any of its batches.

    The reply has ``results``, answers by number, and ``left``, numbers of requests that there was no room for.

    Attributes:
        sampling_session_id: of which sampling session.
        requests: new ones, each with its number.
        received: numbers whose answers have arrived and need not be kept.
        wait: seconds to wait for the first answer; None for who asks for none.
    """

    sampling_session_id: str
    requests: list[JsonObject] = Field(default=[], max_length=MOST_REQUESTS)
    received: list[StrictInt] = []
    wait: float | None = Field(default=None, ge=0)


class RetrieveFuture(WireMessage):
    """``retrieve_future``: wait for the result of a request."""

    request_id: str
    allow_metadata_only: StrictBool = False
