"""Crucible Kitchen: post-training orchestration as checked, durable async workflows.

The public names, resolved when they are first used, so that importing the package costs nothing. Read next:
``crucible_kitchen.kitchen``, then ``crucible_kitchen.workflow.nodes``.
"""

from typing import TYPE_CHECKING

from crucible_kitchen.lazy import lazily

if TYPE_CHECKING:
    from crucible_kitchen.config import CheckpointConfig as CheckpointConfig
    from crucible_kitchen.config import DataConfig as DataConfig
    from crucible_kitchen.config import EvalConfig as EvalConfig
    from crucible_kitchen.config import ModelConfig as ModelConfig
    from crucible_kitchen.config import OptimConfig as OptimConfig
    from crucible_kitchen.config import RegistryConfig as RegistryConfig
    from crucible_kitchen.config import RunConfig as RunConfig
    from crucible_kitchen.errors import CrucibleError as CrucibleError
    from crucible_kitchen.kitchen import Kitchen as Kitchen
    from crucible_kitchen.kitchen import run as run
    from crucible_kitchen.ports import TrainingClient as TrainingClient
    from crucible_kitchen.ports import TrainingSession as TrainingSession
    from crucible_kitchen.registry import Registry as Registry
    from crucible_kitchen.runs import RunHandle as RunHandle
    from crucible_kitchen.runs import RunResult as RunResult
    from crucible_kitchen.types import AdamParams as AdamParams
    from crucible_kitchen.types import Datum as Datum
    from crucible_kitchen.types import LossValue as LossValue
    from crucible_kitchen.types import ModelVersion as ModelVersion
    from crucible_kitchen.types import SamplingParams as SamplingParams
    from crucible_kitchen.types import StepResult as StepResult
    from crucible_kitchen.workflow.check import check as check
    from crucible_kitchen.workflow.nodes import Loop as Loop
    from crucible_kitchen.workflow.nodes import Parallel as Parallel
    from crucible_kitchen.workflow.nodes import Stream as Stream
    from crucible_kitchen.workflow.nodes import When as When
    from crucible_kitchen.workflow.nodes import Workflow as Workflow
    from crucible_kitchen.workflow.recipe import Recipe as Recipe
    from crucible_kitchen.workflow.run import Run as Run
    from crucible_kitchen.workflow.stage import Retry as Retry
    from crucible_kitchen.workflow.stage import stage as stage

__version__ = "0.1.0"

_HOMES = {
    "config": (
        "CheckpointConfig",
        "DataConfig",
        "EvalConfig",
        "ModelConfig",
        "OptimConfig",
        "RegistryConfig",
        "RunConfig",
    ),
    "errors": ("CrucibleError",),
    "kitchen": ("Kitchen", "run"),
    "ports": ("TrainingClient", "TrainingSession"),
    "registry": ("Registry",),
    "runs": ("RunHandle", "RunResult"),
    "types": ("AdamParams", "Datum", "LossValue", "ModelVersion", "SamplingParams", "StepResult"),
    "workflow.check": ("check",),
    "workflow.nodes": ("Loop", "Parallel", "Stream", "When", "Workflow"),
    "workflow.recipe": ("Recipe",),
    "workflow.run": ("Run",),
    "workflow.stage": ("Retry", "stage"),
}
__all__ = [*sorted(name for names in _HOMES.values() for name in names), "__version__"]  # noqa: PLE0604 - names are strings

__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
