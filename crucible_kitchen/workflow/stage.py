"""Stages and resources: ordinary coroutines and async generators with declared reads and writes.

A stage's parameters say what it reads, its decorator what it writes. Nothing here runs a workflow or knows its tree.
Read next: ``crucible_kitchen.workflow.nodes``.
"""

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache, partial
from typing import Any, Final, Generic, Literal, ParamSpec, Protocol, Self, TypeVar, get_args, get_type_hints, overload

from crucible_kitchen.errors import CrucibleError

__all__ = [
    "UNSET",
    "Hooks",
    "Parameter",
    "Resource",
    "Retry",
    "Signature",
    "Stage",
    "StageDecorator",
    "Step",
    "Unset",
    "signature_of",
    "stage",
]

P = ParamSpec("P")
R = TypeVar("R")
OnError = Literal["halt", "skip"]


class Unset(Enum):
    """The type of :data:`UNSET`: an option that was not given, where None means something."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True)
class Retry:
    """When and how often a failed stage is tried again.

    The pause before try ``n + 1`` is ``initial * factor ** (n - 1)`` seconds, times a random factor in
    ``[1 - jitter, 1 + jitter]`` drawn from the run's seed, and never longer than ``maximum``.

    Attributes:
        attempts: tries in all, the first included.
        initial: seconds before the second try.
        factor: growth of the pause.
        maximum: longest pause, seconds.
        jitter: share by which a pause varies, 0 to 1.
        on: exception types worth another try; empty: errors that call themselves retryable.
    """

    attempts: int = 3
    initial: float = 1.0
    factor: float = 2.0
    maximum: float = 60.0
    jitter: float = 0.2
    on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.initial < 0 or self.factor < 1 or self.maximum < 0 or not 0 <= self.jitter <= 1:
            raise ValueError(f"attempts and factor are 1 or more, seconds 0 or more, jitter 0 to 1: {self}")

    def allows(self, error: BaseException, attempt: int) -> bool:
        """Return whether a failure of the given attempt (from 1) is worth another try."""
        worth = isinstance(error, self.on) if self.on else isinstance(error, CrucibleError) and error.retryable
        return worth and attempt < self.attempts

    def pause(self, attempt: int, uniform: float) -> float:
        """Return the seconds to wait after the given attempt; ``uniform`` is a draw from [0, 1)."""
        try:
            base = min(self.maximum, self.initial * self.factor ** (attempt - 1))
        except OverflowError:
            base = self.maximum
        return min(self.maximum, base * (1 + self.jitter * (2 * uniform - 1)))


@dataclass(frozen=True, slots=True)
class Parameter:
    """One thing a function reads: its name, its declared type (Any if none), and its default if it has one."""

    name: str
    type: Any
    optional: bool
    default: Any = None


@dataclass(frozen=True, slots=True)
class Signature:
    """What a function reads and returns; ``problem`` says why its annotations could not be resolved."""

    parameters: tuple[Parameter, ...]
    returns: Any
    problem: str = ""


@lru_cache(maxsize=4096)
def signature_of(fn: Callable[..., Any]) -> Signature:
    """Return what a stage or a selector reads and returns, with annotations resolved."""
    problem = ""
    try:
        hints = get_type_hints(_annotated(fn))
    except (NameError, TypeError, AttributeError) as error:
        hints, problem = {}, f"its annotations cannot be resolved ({error}); import the types it names at run time"
    try:
        declared = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return Signature((), Any, f"the parameters of {fn!r} cannot be read: write a function around it")
    parameters = []
    for name, p in declared.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            problem = f"its parameter {name!r} cannot be injected: parameters need names"
            continue
        optional = p.default is not p.empty
        parameters.append(Parameter(name, hints.get(name, Any), optional, p.default if optional else None))
    return Signature(tuple(parameters), hints.get("return", Any), problem)


def _annotated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function whose annotations speak for a callable: of a partial, of an object with ``__call__``."""
    if isinstance(fn, partial):
        return _annotated(fn.func)
    if inspect.isroutine(fn) or inspect.isclass(fn):
        return fn
    return type(fn).__call__


@dataclass(slots=True)
class Hooks:
    """What a stage's author attached to it; shared by all changed copies of the stage."""

    validate: list[Callable[..., None]] = field(default_factory=list)
    rollback: Callable[..., Coroutine[Any, Any, None]] | None = None


@dataclass(frozen=True)
class Step:
    """What stages and resources have in common; see :func:`stage` for the options."""

    fn: Callable[..., Any]
    name: str
    writes: str | None = None
    timeout: float | Unset | None = UNSET
    retry: Retry | None = None
    on_error: OnError = "halt"
    hooks: Hooks = field(default_factory=Hooks, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.timeout, (int, float)) and self.timeout <= 0:
            raise ValueError(f"the timeout of {self.name!r} must be above 0 seconds, or None for no limit")

    def with_(
        self,
        *,
        name: str | None = None,
        writes: str | Unset | None = UNSET,
        timeout: float | Unset | None = UNSET,
        retry: Retry | Unset | None = UNSET,
        on_error: OnError | None = None,
    ) -> Self:
        """Return a copy with other options; what is not given stays as it is."""
        return replace(
            self,
            name=name or self.name,
            writes=self.writes if isinstance(writes, Unset) else writes,
            timeout=self.timeout if isinstance(timeout, Unset) else timeout,
            retry=self.retry if isinstance(retry, Unset) else retry,
            on_error=on_error or self.on_error,
        )

    def validate(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Attach a precondition, run before the workflow; it may read ``config`` and ports, and raises if unmet.

        Example::

            @train_step.validate
            def _can_train(training_client: TrainingClient) -> None:
                if "cross_entropy" not in training_client.capabilities.losses:
                    raise CapabilityError("this backend has no cross_entropy")
        """
        self.hooks.validate.append(hook)
        return hook

    def rollback(self, hook: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
        """Attach a compensation, run when the run ends ``failed`` and its config says ``on_failure="rollback"``."""
        self.hooks.rollback = hook
        return hook

    @property
    def doc(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.fn) or "").split("\n", 1)[0]

    @property
    def signature(self) -> Signature:
        """What it reads and returns."""
        return signature_of(self.fn)

    @property
    def write_type(self) -> Any:
        """The declared type of what it writes."""
        return self.signature.returns


@dataclass(frozen=True)
class Stage(Step, Generic[P, R]):
    """One step of work: a coroutine. Calling it calls the coroutine, so a unit test needs nothing else."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the stage's own coroutine."""
        return self.fn(*args, **kwargs)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Resource(Step, Generic[P, R]):
    """A stage that yields a live thing and closes it when its block ends: an async generator of one item."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[R]:
        """Call the resource's own generator."""
        return self.fn(*args, **kwargs)  # type: ignore[no-any-return]

    @property
    def write_type(self) -> Any:
        """The declared type of what it yields."""
        args = get_args(self.signature.returns)
        return args[0] if args else Any


class StageDecorator(Protocol):
    """What ``stage(...)`` returns: a coroutine becomes a Stage, an async generator a Resource."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]]) -> Stage[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, AsyncIterator[R]]) -> Resource[P, R]: ...


def stage(
    *,
    writes: str | None = None,
    name: str | None = None,
    timeout: float | Unset | None = UNSET,
    retry: Retry | None = None,
    on_error: OnError = "halt",
) -> StageDecorator:
    """Make a stage of a coroutine, or a resource of an async generator.

    Args:
        writes: the one name of the state that its return value (or what it yields) is written to.
        name: what it is called in paths and events; unset: the function's name.
        timeout: seconds it may take (a resource: its opening); unset: the config's ``stage_timeout``; None: no limit.
        retry: what failures are tried again.
        on_error: ``halt`` ends the run; ``skip`` goes on without what it would have written.

    Example::

        @stage(writes="step")
        async def train_step(session: TrainingSession, batch: Batch, config: OptimConfig, run: Run) -> StepResult:
            ...
    """

    def decorate(fn: Callable[..., Any]) -> Any:
        label = name or str(getattr(fn, "__name__", type(fn).__name__))
        kind: type[Step]
        if inspect.isasyncgenfunction(fn):
            kind = Resource
        elif inspect.iscoroutinefunction(fn):
            kind = Stage
        else:
            raise TypeError(f"stage {label!r} is neither a coroutine nor an async generator: write `async def`")
        return kind(fn, label, writes, timeout, retry, on_error)

    return decorate
