"""Every error this project raises, as one tree with stable codes.

It knows nothing of the rest of the package. Read next: ``crucible_kitchen.types``.

::

    CrucibleError
    ├── ConfigError (ValueError)             config.invalid
    ├── WorkflowError (ValueError)           workflow.invalid
    ├── NotFoundError (LookupError)          not_found
    │   ├── ModelNotFound                    not_found.model
    │   ├── DatasetNotFound                  not_found.dataset
    │   ├── RunNotFound                      not_found.run
    │   ├── VersionNotFound                  not_found.version
    │   └── BlobNotFound                     not_found.blob
    ├── AdapterError                         adapter
    │   ├── MissingExtra (ImportError)       adapter.missing_extra
    │   ├── CapabilityError                  adapter.capability
    │   └── SandboxUnavailable               adapter.sandbox
    ├── DataError (ValueError)               data
    │   ├── EmptyDataset                     data.empty
    │   ├── RowError                         data.row
    │   └── SequenceTooLong                  data.too_long
    ├── BackendError                         backend
    │   ├── BackendUserError                 backend.user
    │   ├── TransientBackendError            backend.transient    (may be retried)
    │   ├── CapacityError                    backend.capacity     (may be retried, later)
    │   ├── SessionLost                      backend.session_lost
    │   └── OutOfMemory (MemoryError)        backend.out_of_memory
    ├── TrainingError                        training
    │   ├── NonFiniteLoss                    training.non_finite_loss
    │   └── LedgerBroken                     training.ledger
    ├── EnvironmentFailure                   environment
    │   ├── EnvironmentFault                 environment.fault
    │   └── EnvironmentTimeout (TimeoutError)  environment.timeout
    ├── StageError                           stage
    │   ├── StageFailed                      stage.failed
    │   ├── StageTimeout (TimeoutError)      stage.timeout
    │   └── CleanupError                     stage.cleanup
    ├── ActorError                           actor
    │   ├── ActorStopped                     actor.stopped
    │   ├── ActorRestarted                   actor.restarted    (may be retried)
    │   ├── MessageQuarantined               actor.quarantined
    │   └── TooManyRestarts                  actor.too_many_restarts
    ├── WorkerError                          worker
    │   ├── WorkerTimeout (TimeoutError)     worker.timeout
    │   ├── WorkerRaised                     worker.raised
    │   └── WorkerDied                       worker.died
    ├── StoreError                           store
    │   ├── StorageFull (OSError)            store.full
    │   ├── IntegrityError                   store.integrity
    │   └── Conflict                         store.conflict
    │       ├── RunLive                      run.live
    │       ├── RunEnded                     run.ended
    │       └── LeaseLost                    run.lease_lost
    ├── RunCancelled                         run.cancelled
    ├── RunStalled (TimeoutError)            run.stalled
    ├── RunPaused                            run.paused
    ├── RunChanged                           run.changed
    ├── RunNotReproducible                   run.not_reproducible
    └── ReplayMismatch                       run.replay_mismatch

Catch a family by its class, decide by ``code``, never by the text of a message. To add one: subclass the family it
belongs to and the closest class of the standard library, give it a ``code``, and draw it here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

__all__ = [
    "ActorError",
    "ActorRestarted",
    "ActorStopped",
    "AdapterError",
    "BackendError",
    "BackendUserError",
    "BlobNotFound",
    "CapabilityError",
    "CapacityError",
    "CleanupError",
    "ConfigError",
    "Conflict",
    "CrucibleError",
    "DataError",
    "DatasetNotFound",
    "EmptyDataset",
    "EnvironmentFailure",
    "EnvironmentFault",
    "EnvironmentTimeout",
    "IntegrityError",
    "LeaseLost",
    "LedgerBroken",
    "MessageQuarantined",
    "MissingExtra",
    "ModelNotFound",
    "NonFiniteLoss",
    "NotFoundError",
    "OutOfMemory",
    "ReplayMismatch",
    "RowError",
    "RunCancelled",
    "RunChanged",
    "RunEnded",
    "RunLive",
    "RunNotFound",
    "RunNotReproducible",
    "RunPaused",
    "RunStalled",
    "SandboxUnavailable",
    "SequenceTooLong",
    "SessionLost",
    "StageError",
    "StageFailed",
    "StageTimeout",
    "StorageFull",
    "StoreError",
    "TooManyRestarts",
    "TrainingError",
    "TransientBackendError",
    "VersionNotFound",
    "WorkerDied",
    "WorkerError",
    "WorkerRaised",
    "WorkerTimeout",
    "WorkflowError",
]


class CrucibleError(Exception):
    """Raised when something this project knows about went wrong; the root of the tree.

    Args:
        message: what happened, in one sentence, without secrets or dataset rows.
        hint: what to do about it, in one sentence.
        where: the path of the stage it happened in; the engine fills it in where it is missing.

    Example::

        try:
            await Kitchen().run("supervised", config)
        except BackendError as error:   # a backend's fault
            print(error.code, error.where, error.hint)
        except CrucibleError as error:  # anything else of ours
            print(error)
    """

    code: ClassVar[str] = "crucible"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where

    def at(self, where: str) -> Self:
        """Return self with the place filled in, if no place was known before."""
        if self.where is None:
            self.where = where
        return self

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[CrucibleError], args: tuple[Any, ...], state: dict[str, Any]) -> CrucibleError:
    """Rebuild an error on the other side of a process boundary without calling its constructor."""
    # MemoryError makes its own instances from a free list and refuses to make a subclass's.
    error: CrucibleError = (Exception if issubclass(cls, MemoryError) else cls).__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(CrucibleError, ValueError):
    """Raised when a config has an unknown key, a value of the wrong type or a value out of range."""

    code = "config.invalid"


class WorkflowError(CrucibleError, ValueError):
    """Raised when the check of a workflow found problems; ``problems`` lists all of them, one line each."""

    code = "workflow.invalid"

    def __init__(self, workflow: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"workflow {workflow!r} has {count}: " + "; ".join(self.problems))


class NotFoundError(CrucibleError, LookupError):
    """Raised when a name does not lead to anything."""

    code = "not_found"


class ModelNotFound(NotFoundError):
    """Raised when a model is neither a built-in name, a directory nor a reachable hub id."""

    code = "not_found.model"


class DatasetNotFound(NotFoundError):
    """Raised when a dataset is neither a built-in task, a file nor a reachable hub id, or lacks the split."""

    code = "not_found.dataset"


class RunNotFound(NotFoundError):
    """Raised when the run store holds no run of this id."""

    code = "not_found.run"


class VersionNotFound(NotFoundError):
    """Raised when the model registry holds no such model, version or alias."""

    code = "not_found.version"


class BlobNotFound(NotFoundError):
    """Raised when the blob store holds no blob of this address."""

    code = "not_found.blob"


class AdapterError(CrucibleError):
    """Raised when an adapter is missing, cannot be built from its options, or does not fulfil its port."""

    code = "adapter"


class MissingExtra(AdapterError, ImportError):
    """Raised when an optional package is not installed; the hint is the line that installs it."""

    code = "adapter.missing_extra"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"the package {package!r} is not installed", hint=f"pip install 'crucible-kitchen[{extra}]'")
        self.extra = extra


class CapabilityError(AdapterError):
    """Raised when a run asks a backend for something that it can neither do nor emulate."""

    code = "adapter.capability"


class SandboxUnavailable(AdapterError):
    """Raised when the kernel does not allow what keeps programs apart, and nobody said to go on without it."""

    code = "adapter.sandbox"


class DataError(CrucibleError, ValueError):
    """Raised when a dataset cannot be used as it is."""

    code = "data"


class EmptyDataset(DataError):
    """Raised when a dataset, or the split asked for, has no rows."""

    code = "data.empty"


class RowError(DataError):
    """Raised when a row lacks what is expected of it; says which row and field, never the row itself.

    Args:
        row: index of the row in its dataset, counted from 0.
        field: the field that is missing or of the wrong kind.
        problem: what is wrong with it.
        hint: what to do.
    """

    code = "data.row"

    def __init__(self, row: int, field: str, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"row {row}, field {field!r}: {problem}", hint=hint)
        self.row = row
        self.field = field


class SequenceTooLong(DataError):
    """Raised when a sequence exceeds the context and the config says to refuse instead of truncate."""

    code = "data.too_long"


class BackendError(CrucibleError):
    """Raised when a backend failed."""

    code = "backend"


class BackendUserError(BackendError):
    """Raised when a backend refused a request because of what was asked; trying again cannot help."""

    code = "backend.user"


class TransientBackendError(BackendError):
    """Raised when a backend failed in a way that may pass: a lost connection, a time-out, an internal error."""

    code = "backend.transient"
    retryable = True


class CapacityError(BackendError):
    """Raised when a backend has no capacity at the moment; worth trying again after a longer wait."""

    code = "backend.capacity"
    retryable = True


class SessionLost(BackendError):
    """Raised when a backend no longer knows a session, or a submission's fate cannot be known."""

    code = "backend.session_lost"


class OutOfMemory(BackendError, MemoryError):
    """Raised when the machine has too little memory for what was asked."""

    code = "backend.out_of_memory"


class TrainingError(CrucibleError):
    """Raised when training cannot go on."""

    code = "training"


class NonFiniteLoss(TrainingError):
    """Raised when a step's loss or gradient is NaN or infinite; ``keys`` names the batch's examples."""

    code = "training.non_finite_loss"

    def __init__(self, what: str, step: int, keys: Sequence[str]) -> None:
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        super().__init__(
            f"{what} is not finite at step {step}; the batch holds {shown}",
            hint="lower learning_rate or set grad_clip_norm; the last checkpoint is kept",
        )
        self.step = step
        self.keys = tuple(keys)


class LedgerBroken(TrainingError):
    """Raised when the ledger of rollouts does not add up: a group was lost or counted twice. A bug."""

    code = "training.ledger"


class EnvironmentFailure(CrucibleError):
    """Raised when an environment did not do its part; what it says is never a reward."""

    code = "environment"


class EnvironmentFault(EnvironmentFailure):
    """Raised when an environment broke: it raised, never ended, or gave a reward that is no finite number."""

    code = "environment.fault"


class EnvironmentTimeout(EnvironmentFailure, TimeoutError):
    """Raised when an environment or its reward took longer than it may."""

    code = "environment.timeout"


class StageError(CrucibleError):
    """Raised when a stage ended badly."""

    code = "stage"


class StageFailed(StageError):
    """Raised when a stage raised something that is not of this tree; the original is ``__cause__``."""

    code = "stage.failed"


class StageTimeout(StageError, TimeoutError):
    """Raised when a stage did not end within its timeout."""

    code = "stage.timeout"


class CleanupError(StageError):
    """Raised when a resource could not be closed, or not within the grace period."""

    code = "stage.cleanup"


class ActorError(CrucibleError):
    """Raised when an actor failed."""

    code = "actor"


class ActorStopped(ActorError):
    """Raised when an actor that was asked or told something has stopped for good; the message was not handled whole."""

    code = "actor.stopped"


class ActorRestarted(ActorError):
    """Raised when the incarnation that alone was to answer is gone; what it knew is gone with it."""

    code = "actor.restarted"
    retryable = True


class MessageQuarantined(ActorError):
    """Raised when a message killed the actor that handled it so often that it is not delivered again."""

    code = "actor.quarantined"


class TooManyRestarts(ActorError):
    """Raised when a supervisor gave up: its children died more often in its window than it may restart them."""

    code = "actor.too_many_restarts"


class WorkerError(CrucibleError):
    """Raised when code in a worker process did not give a result."""

    code = "worker"


class WorkerTimeout(WorkerError, TimeoutError):
    """Raised when code in a worker process exceeded its time; it was killed with everything it started."""

    code = "worker.timeout"


class WorkerRaised(WorkerError):
    """Raised when code in a worker process raised; ``error`` is the name of what it raised."""

    code = "worker.raised"

    def __init__(self, message: str, error: str) -> None:
        super().__init__(message, hint="try the function in a shell of its own")
        self.error = error


class WorkerDied(WorkerError):
    """Raised when a worker process ended by itself: it crashed, was killed, or could not start."""

    code = "worker.died"


class StoreError(CrucibleError):
    """Raised when the run store, the registry or the blob store failed."""

    code = "store"


class StorageFull(StoreError, OSError):
    """Raised when the disk is full; what was saved before is untouched."""

    code = "store.full"


class IntegrityError(StoreError):
    """Raised when stored bytes do not match their hash."""

    code = "store.integrity"


class Conflict(StoreError):
    """Raised when a compare-and-set found another value than expected, or a name is already taken."""

    code = "store.conflict"


class RunLive(Conflict):
    """Raised when a run is asked for that a living process, or one whose lease has not ended, still owns."""

    code = "run.live"


class RunEnded(Conflict):
    """Raised when a run is to go on, or to be written to, that has ended."""

    code = "run.ended"


class LeaseLost(Conflict):
    """Raised when an attempt writes to its run after another one took the run over; nothing of it was written."""

    code = "run.lease_lost"


class RunCancelled(CrucibleError):
    """Raised by ``wait()`` of a run that was cancelled."""

    code = "run.cancelled"


class RunStalled(CrucibleError, TimeoutError):
    """Raised when nothing of a run moved for ``stall_after`` seconds and its config says to end it then.

    The message names what everything waited for, and since when.
    """

    code = "run.stalled"


class RunPaused(CrucibleError):
    """Raised by ``wait()`` of a run that was asked to drain and stopped at a checkpoint; it can be resumed."""

    code = "run.paused"


class RunChanged(CrucibleError):
    """Raised when a run is to be resumed with another config, dataset, workflow or version than it was started with.

    ``differences`` says what was and what is, by field.
    """

    code = "run.changed"

    def __init__(self, run_id: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        self.differences = dict(differences)
        shown = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in self.differences.items())
        allowed = " ".join(f"--allow-changed {name}" for name in self.differences)
        super().__init__(
            f"the run {run_id} would not be the same run: {shown}", hint=f"resume it nevertheless: {allowed}"
        )


class RunNotReproducible(CrucibleError):
    """Raised when a run is to be repeated bit for bit that cannot be."""

    code = "run.not_reproducible"


class ReplayMismatch(CrucibleError):
    """Raised when what is recorded of an earlier attempt does not fit the workflow as it is now."""

    code = "run.replay_mismatch"
