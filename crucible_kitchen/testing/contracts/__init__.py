"""Contract suites: what every adapter of a port must do, as checks that anybody can run on an adapter of their own.

A suite is a sequence of async functions of one case; a check raises ``AssertionError`` where the contract is broken
and ``unittest.SkipTest`` where it does not apply. The suites know no test runner; with pytest one test holds an adapter
to all of them::

    from crucible_kitchen.testing import contracts

    @pytest.mark.anyio
    @pytest.mark.parametrize("check", contracts.BLOB_STORE, ids=contracts.name)
    async def test_my_blob_store(check, tmp_path):
        await check(contracts.BlobStoreCase(MyBlobStore(), tmp_path))

Read next: ``crucible_kitchen.testing.contracts.base``.
"""

from crucible_kitchen.testing.contracts.base import Suite as Suite
from crucible_kitchen.testing.contracts.base import name as name
from crucible_kitchen.testing.contracts.blob_store import BLOB_STORE as BLOB_STORE
from crucible_kitchen.testing.contracts.blob_store import BlobStoreCase as BlobStoreCase
from crucible_kitchen.testing.contracts.dataset_store import DATASET_STORE as DATASET_STORE
from crucible_kitchen.testing.contracts.dataset_store import DatasetStoreCase as DatasetStoreCase
from crucible_kitchen.testing.contracts.environment import ENVIRONMENT as ENVIRONMENT
from crucible_kitchen.testing.contracts.environment import EnvironmentCase as EnvironmentCase
from crucible_kitchen.testing.contracts.evaluator import EVALUATOR as EVALUATOR
from crucible_kitchen.testing.contracts.evaluator import EvaluatorCase as EvaluatorCase
from crucible_kitchen.testing.contracts.llm_client import LLM_CLIENT as LLM_CLIENT
from crucible_kitchen.testing.contracts.llm_client import LLMClientCase as LLMClientCase
from crucible_kitchen.testing.contracts.model_registry import MODEL_REGISTRY as MODEL_REGISTRY
from crucible_kitchen.testing.contracts.model_registry import ModelRegistryCase as ModelRegistryCase
from crucible_kitchen.testing.contracts.sampling_client import SAMPLING_CLIENT as SAMPLING_CLIENT
from crucible_kitchen.testing.contracts.sampling_client import SamplingClientCase as SamplingClientCase
from crucible_kitchen.testing.contracts.training_client import TRAINING_CLIENT as TRAINING_CLIENT
from crucible_kitchen.testing.contracts.training_client import TrainingClientCase as TrainingClientCase

__all__ = [
    "BLOB_STORE",
    "DATASET_STORE",
    "ENVIRONMENT",
    "EVALUATOR",
    "LLM_CLIENT",
    "MODEL_REGISTRY",
    "SAMPLING_CLIENT",
    "TRAINING_CLIENT",
    "BlobStoreCase",
    "DatasetStoreCase",
    "EnvironmentCase",
    "EvaluatorCase",
    "LLMClientCase",
    "ModelRegistryCase",
    "SamplingClientCase",
    "Suite",
    "TrainingClientCase",
    "name",
]
