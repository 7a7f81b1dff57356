"""Teachers: which models a student learns from, opened for as long as the run needs them and always released.

Knows ports, no method of distillation. Read next: ``crucible_kitchen.stages.distillation``.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.ports import (
    BlobStore,
    ModelRegistry,
    Sampler,
    SamplingClient,
    Tokenizer,
    TrainingClient,
    TrainingSession,
)
from crucible_kitchen.stages.stored import fetched, found_locally
from crucible_kitchen.types import BlobRef, LoraSpec, SessionSpec
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = ["Teacher", "TeacherConfig", "TeacherSpec", "Teachers", "open_teachers", "teacher_untold"]


class TeacherSpec(BaseModel):
    """One teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """A model's name, a registered version ``name:version``, or the name a service has for it."""

    through: Literal["", "training_client", "sampling_client"] = ""
    """Which adapter opens it; unset: the ``sampling_client`` if there is one, else the ``training_client``."""

    dataset: str = ""
    """The dataset whose prompts it teaches; unset: the config's."""

    weight: float = Field(default=1.0, gt=0)
    """Share of its dataset's prompts, beside the other teachers of that dataset."""

    system_prompt: str | None = None
    """What it is told and the student is not; unset: the config's ``teacher_system_prompt``."""


class TeacherConfig(RunConfig):
    """Whom the student learns from."""

    teacher: str = ""
    """The teacher: a model, a registered version ``name:version``, or a service's name for it. Unset with a built-in
    task: a teacher is trained first, see ``teacher_training``."""

    teachers: tuple[TeacherSpec, ...] = ()
    """Several teachers, by dataset or by weight: ``[{"model": ..., "dataset": ..., "weight": ...}, ...]``."""

    teacher_system_prompt: str = ""
    """What the teacher is told and the student is not (context distillation)."""

    @property
    def specs(self) -> tuple[TeacherSpec, ...]:
        """The teachers that were named."""
        return self.teachers or ((TeacherSpec(model=self.teacher),) if self.teacher else ())

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if self.teacher and self.teachers:
            raise ValueError("give teacher or teachers, not both")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """An opened teacher.

    Attributes:
        spec: how it was named.
        sampler: draws and scores tokens.
        session: the frozen model behind it; None for a served one.
        system_prompt: what it is told.
    """

    spec: TeacherSpec
    sampler: Sampler
    session: TrainingSession | None
    system_prompt: str

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return self.sampler.tokenizer

    @property
    def context_length(self) -> int:
        """Its longest sequence in tokens; 0 where a service does not tell."""
        return self.session.info.context_length if self.session is not None else 0


@dataclass(frozen=True, slots=True, eq=False)
class Teachers:
    """All teachers, in the order in which they were named."""

    members: tuple[Teacher, ...]


def teacher_untold(config: TeacherConfig) -> bool:
    """Whether no teacher was named, so that one is trained first."""
    return not config.specs


@stage(writes="teachers")
async def open_teachers(
    training_client: TrainingClient,
    config: TeacherConfig,
    run: Run,
    sampling_client: SamplingClient | None = None,
    model_registry: ModelRegistry | None = None,
    blob_store: BlobStore | None = None,
    teacher_weights: BlobRef | None = None,
) -> AsyncIterator[Teachers]:
    """Open all teachers; they are released when the workflow ends, whatever happened."""
    async with AsyncExitStack() as stack:
        source = _Source(training_client, sampling_client, model_registry, blob_store, config, run, stack)
        if teacher_weights is not None:
            directory = await fetched(teacher_weights.uri, "teacher-trained", blob_store, run)
            specs: Sequence[TeacherSpec] = [TeacherSpec(model=directory, through="training_client")]
        else:
            specs = config.specs
        yield Teachers(tuple([await source.open(spec, number) for number, spec in enumerate(specs)]))


@open_teachers.validate
def _there_is_somebody_to_open_them(config: TeacherConfig, sampling_client: SamplingClient | None = None) -> None:
    if sampling_client is None and any(spec.through == "sampling_client" for spec in config.specs):
        raise CapabilityError("a teacher is served, but there is no sampling_client", hint="--adapter sampling_client=")


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Where teachers come from."""

    training_client: TrainingClient
    sampling_client: SamplingClient | None
    model_registry: ModelRegistry | None
    blob_store: BlobStore | None
    config: TeacherConfig
    run: Run
    stack: AsyncExitStack

    async def open(self, spec: TeacherSpec, number: int) -> Teacher:
        system = self.config.teacher_system_prompt if spec.system_prompt is None else spec.system_prompt
        through = spec.through or ("sampling_client" if self.sampling_client is not None else "training_client")
        if through == "sampling_client":
            assert self.sampling_client is not None, "checked before the run"
            served = await self.stack.enter_async_context(self.sampling_client.open_sampler(spec.model))
            return Teacher(spec, served, None, system)
        can = self.training_client.capabilities
        frozen = SessionSpec(
            model=await found_locally(spec.model, f"teacher-{number}", self.model_registry, self.blob_store, self.run),
            lora=None if can.full_weights else LoraSpec(rank=8),
            seed=self.config.seed,
            directory=str(self.run.directory),
            run_id=self.run.id,
        )
        session = await self.stack.enter_async_context(self.training_client.open_session(frozen))
        sampler = await session.sampler()
        self.stack.push_async_callback(sampler.aclose)
        return Teacher(spec, sampler, session, system)
