"""Embedded adapters that need nothing: one per port, in memory, deterministic and seeded.

They keep every guarantee of their ports, so that workflows can be tested on them, and mark what they measure as
synthetic. They know no other adapter and no engine. Read next: ``crucible_kitchen_noop.session``.
"""

from crucible_kitchen_noop.blobs import NoopBlobStore as NoopBlobStore
from crucible_kitchen_noop.chat import NoopLLMClient as NoopLLMClient
from crucible_kitchen_noop.datasets import NoopDatasetStore as NoopDatasetStore
from crucible_kitchen_noop.evaluation import NoopEvaluator as NoopEvaluator
from crucible_kitchen_noop.registry import NoopModelRegistry as NoopModelRegistry
from crucible_kitchen_noop.sampler import NoopSamplingClient as NoopSamplingClient
from crucible_kitchen_noop.training import NoopTrainingClient as NoopTrainingClient

__all__ = [
    "NoopBlobStore",
    "NoopDatasetStore",
    "NoopEvaluator",
    "NoopLLMClient",
    "NoopModelRegistry",
    "NoopSamplingClient",
    "NoopTrainingClient",
]
