"""The ports: what a backend can be asked, one Protocol per file, and the table of all of them.

A port's docstring states its guarantees; the contract suites in ``crucible_kitchen.testing`` hold adapters to them.
No port knows another, none knows an adapter.
"""

from dataclasses import dataclass

from crucible_kitchen.ports.adapter import Adapter
from crucible_kitchen.ports.blob_store import BlobStore
from crucible_kitchen.ports.dataset_store import Dataset, DatasetSpec, DatasetStore
from crucible_kitchen.ports.environment import Environment, EnvironmentGroup, EnvironmentSource, VectorEnvironment
from crucible_kitchen.ports.evaluator import EvalExample, EvalReport, Evaluator, Prediction, Predictor
from crucible_kitchen.ports.llm_client import ChatReply, LLMClient
from crucible_kitchen.ports.model_registry import ModelRegistry
from crucible_kitchen.ports.sampling_client import Policy, Sampler, SamplingClient
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.ports.training_client import (
    Pending,
    TrainingCapabilities,
    TrainingClient,
    TrainingSession,
    TrainingStepScope,
    needed_inputs,
    require_outputs,
)

__all__ = [
    "PORTS",
    "Adapter",
    "BlobStore",
    "ChatReply",
    "Dataset",
    "DatasetSpec",
    "DatasetStore",
    "Environment",
    "EnvironmentGroup",
    "EnvironmentSource",
    "EvalExample",
    "EvalReport",
    "Evaluator",
    "LLMClient",
    "ModelRegistry",
    "Pending",
    "Policy",
    "Port",
    "Prediction",
    "Predictor",
    "Sampler",
    "SamplingClient",
    "Tokenizer",
    "TrainingCapabilities",
    "TrainingClient",
    "TrainingSession",
    "TrainingStepScope",
    "VectorEnvironment",
    "needed_inputs",
    "require_outputs",
]


@dataclass(frozen=True, slots=True)
class Port:
    """A port as the registry knows it: its name, its Protocol and what it is for."""

    name: str
    protocol: type
    purpose: str


PORTS: dict[str, Port] = {
    port.name: port
    for port in (
        Port("training_client", TrainingClient, "training sessions"),
        Port("sampling_client", SamplingClient, "samples and log-probabilities from a served model"),
        Port("dataset_store", DatasetStore, "datasets with random access"),
        Port("evaluator", Evaluator, "metrics over a model's predictions"),
        Port("model_registry", ModelRegistry, "model versions, aliases, lineage"),
        Port("blob_store", BlobStore, "content-addressed artifacts"),
        Port("llm_client", LLMClient, "chat with a served model, structured output"),
    )
}
