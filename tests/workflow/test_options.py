"""A stage's options: timeout, retry, on_error; and its hooks: validate, rollback."""

import contextlib
import itertools
import random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import (
    CapabilityError,
    CrucibleError,
    StageFailed,
    StageTimeout,
    StoreError,
    TransientBackendError,
    WorkflowError,
)
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.nodes import Loop, When, Workflow
from crucible_kitchen.workflow.run import Run, seed_of
from crucible_kitchen.workflow.stage import Retry, stage

pytestmark = pytest.mark.anyio
virtual = pytest.mark.parametrize("anyio_backend", [virtual_clock()], ids=["virtual"])


# -- timeouts -------------------------------------------------------------------------------------------------------


@stage(writes="x")
async def sleepy(config: RunConfig) -> int:
    await anyio.sleep(4000)
    return 1


@virtual
@pytest.mark.parametrize(
    ("timeout", "config", "limit"),
    [(5.0, RunConfig(), 5), (None, RunConfig(stage_timeout=3), None), ("default", RunConfig(stage_timeout=3), 3)],
)
async def test_a_stage_has_its_own_timeout_or_the_configs_or_none(
    timeout: Any, config: RunConfig, limit: float | None, run_workflow: Any
) -> None:
    step = sleepy if timeout == "default" else stage(writes="x", timeout=timeout)(sleepy.fn)
    began = anyio.current_time()
    if limit is None:
        assert await run_workflow(Workflow("w", step), config) == {"x": 1}
        return
    with pytest.raises(StageTimeout, match=f"w/sleepy: did not end within {limit} s") as caught:
        await run_workflow(Workflow("w", step), config)
    assert anyio.current_time() - began == pytest.approx(limit)
    assert "stage_timeout" in (caught.value.hint or "")


@virtual
async def test_an_hour_is_the_default_and_loops_have_no_timeout(run_workflow: Any) -> None:
    assert RunConfig().stage_timeout == 3600

    @stage()
    async def half_an_hour() -> None:
        await anyio.sleep(1800)

    await run_workflow(Workflow("w", Loop("i", lambda: range(5), half_an_hour)))


@virtual
async def test_a_stage_that_swallows_its_timeout_once_is_still_ended(run_workflow: Any) -> None:
    @stage(timeout=2)
    async def stubborn() -> None:
        with contextlib.suppress(BaseException):
            await anyio.sleep_forever()
        await anyio.sleep_forever()

    with pytest.raises(StageTimeout):
        await run_workflow(Workflow("w", stubborn))


@virtual
async def test_what_a_stage_raises_because_of_its_timeout_is_a_timeout(run_workflow: Any) -> None:
    @stage(timeout=2)
    async def messy() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("while cleaning")

    with pytest.raises(StageTimeout) as caught:
        await run_workflow(Workflow("w", messy))
    assert isinstance(caught.value.__cause__, OSError)


@virtual
async def test_a_stage_that_fails_past_its_deadline_for_another_reason_keeps_its_error(run_workflow: Any) -> None:
    @stage(timeout=2)
    async def late() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(3)
        raise OSError("its own")

    with pytest.raises(StageFailed, match="OSError: its own"):
        await run_workflow(Workflow("w", late))


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_timeout_is_above_zero(timeout: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 seconds, or None"):
        sleepy.with_(timeout=timeout)


# -- retries --------------------------------------------------------------------------------------------------------


def flaky(errors: list[Exception], **options: Any) -> tuple[Any, list[float]]:
    times: list[float] = []

    async def body(run: Run) -> int:
        times.append(anyio.current_time())
        assert run.attempt == len(times)
        if errors:
            raise errors.pop(0)
        return run.attempt

    return stage(name="flaky", writes="x", **options)(body), times


@virtual
async def test_retries_wait_longer_each_time_with_jitter_from_the_runs_seed(run_workflow: Any) -> None:
    retry = Retry(attempts=5, initial=1, factor=10, maximum=60, jitter=0.5)
    step, times = flaky([TransientBackendError("x")] * 4, retry=retry)
    assert await run_workflow(Workflow("w", step)) == {"x": 5}
    draws = [random.Random(seed_of(7, "w/flaky", f"retry{n}")).random() for n in (1, 2, 3, 4)]
    expected = [min(60, base * (1 + 0.5 * (2 * d - 1))) for base, d in zip((1, 10, 60, 60), draws, strict=True)]
    waits = [b - a for a, b in itertools.pairwise(times)]
    assert waits == pytest.approx(expected)


@virtual
async def test_a_stage_gives_up_after_its_attempts(run_workflow: Any, log: Any) -> None:
    step, times = flaky([TransientBackendError("x")] * 9, retry=Retry(attempts=3, initial=100, jitter=0))
    with pytest.raises(TransientBackendError, match="w/flaky: x"):
        await run_workflow(Workflow("w", step))
    assert [t - times[0] for t in times] == pytest.approx([0, 60, 120])
    assert log.lines == [
        "stage.start w/flaky",
        "stage.error w/flaky backend.transient retry",
        "stage.start w/flaky",
        "stage.error w/flaky backend.transient retry",
        "stage.start w/flaky",
        "stage.error w/flaky backend.transient halt",
    ]


@pytest.mark.parametrize(
    ("on", "error", "tries"),
    [
        ((), TransientBackendError("x"), 2),
        ((), StoreError("x"), 1),
        ((), OSError("x"), 1),
        ((OSError,), OSError("x"), 2),
        ((OSError,), ExceptionGroup("g", [OSError("x")]), 2),
        ((OSError,), TransientBackendError("x"), 1),
    ],
)
async def test_only_failures_of_the_named_types_are_tried_again(
    on: Any, error: Exception, tries: int, run_workflow: Any
) -> None:
    step, times = flaky([error], retry=Retry(attempts=2, initial=0, on=on))
    with contextlib.suppress(CrucibleError):
        await run_workflow(Workflow("w", step))
    assert len(times) == tries


def test_a_pause_is_never_longer_than_the_maximum_however_often() -> None:
    retry = Retry(attempts=10**6, initial=1, factor=2, maximum=60, jitter=1)
    assert max(retry.pause(n, 0.999999) for n in (1, 5, 10, 2000)) == 60
    assert retry.pause(1, 0.0) == 0


@pytest.mark.parametrize("bad", [{"attempts": 0}, {"jitter": 2}, {"factor": 0.5}, {"initial": -1}])
def test_a_retry_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attempts and factor are 1 or more"):
        Retry(**bad)


# -- on_error -------------------------------------------------------------------------------------------------------


async def test_skip_goes_on_without_what_would_have_been_written(run_workflow: Any, log: Any) -> None:
    seen = []

    @stage()
    async def look(x: int | None = None) -> None:
        seen.append(x)

    step, _ = flaky([OSError("no")], on_error="skip")
    assert await run_workflow(Workflow("w", step, look)) == {}
    assert seen == [None]
    assert "stage.error w/flaky stage.failed skip" in log.lines


def test_with_gives_a_copy_and_leaves_the_rest() -> None:
    step = sleepy.with_(timeout=None, on_error="skip", name="nap")
    again = step.with_(writes=None)
    assert (step.timeout, step.on_error, step.name, step.writes) == (None, "skip", "nap", "x")
    assert (again.timeout, again.writes, sleepy.on_error) == (None, None, "halt")


# -- hooks ----------------------------------------------------------------------------------------------------------


def hooked(hook: Any) -> Workflow:
    @stage()
    async def step() -> None: ...

    step.validate(hook)
    return Workflow("w", step)


def test_a_precondition_is_asked_before_the_run_with_config_and_ports() -> None:
    seen = []

    def hook(config: RunConfig, evaluator: Any, llm_client: Any = "none") -> None:
        seen.append((config.seed, evaluator, llm_client))

    check(hooked(hook), adapters={"evaluator": EvaluatorLike()}, config=RunConfig(seed=3))
    assert [(s, type(e).__name__, c) for s, e, c in seen] == [(3, "EvaluatorLike", "none")]


class EvaluatorLike:
    synthetic = False

    def __getattr__(self, name: str) -> Any:
        return None


def test_an_unmet_or_broken_precondition_is_a_problem_with_its_stages_path() -> None:
    def unmet(config: RunConfig) -> None:
        raise CapabilityError("no cross_entropy", hint="use torch")

    def broken(config: RunConfig) -> None:
        raise KeyError("x")

    with pytest.raises(WorkflowError) as caught:
        check(hooked(unmet), config=RunConfig())
    assert caught.value.problems == ("w/step: no cross_entropy (use torch)",)
    with pytest.raises(WorkflowError, match="w/step: its validate hook failed: KeyError: 'x'"):
        check(hooked(broken), config=RunConfig())


class Undo:
    """Stages with compensations that write down what happens."""

    def __init__(self) -> None:
        self.diary: list[str] = []

    def step(self, name: str, *, undo: Any = None, error: Exception | None = None) -> Any:
        async def body() -> str:
            self.diary.append(name)
            await anyio.lowlevel.checkpoint()
            if error:
                raise error
            return name

        made = stage(name=name, writes=name)(body)

        async def rollback(run: Run) -> None:
            await anyio.lowlevel.checkpoint()
            self.diary.append(f"undo {run.path}")
            if undo:
                raise undo

        made.rollback(rollback)
        return made


async def test_compensations_run_newest_first_when_the_run_fails_and_asked_for_it(run_workflow: Any, log: Any) -> None:
    undo = Undo()
    steps = [undo.step("a"), When(lambda: True, undo.step("b")), undo.step("c", error=OSError("no"))]
    with pytest.raises(StageFailed, match="w/c: OSError"):
        await run_workflow(Workflow("w", *steps), RunConfig(on_failure="rollback"))
    assert undo.diary == ["a", "b", "c", "undo w/b", "undo w/a"]
    assert log.lines[-4:] == [
        "stage.start w/b/rollback",
        "stage.stop w/b/rollback",
        "stage.start w/a/rollback",
        "stage.stop w/a/rollback",
    ]


async def test_compensations_do_not_run_by_default_nor_on_success(run_workflow: Any) -> None:
    undo = Undo()
    with pytest.raises(StageFailed):
        await run_workflow(Workflow("w", undo.step("a"), undo.step("c", error=OSError("no"))))
    await run_workflow(Workflow("w", undo.step("d")), RunConfig(on_failure="rollback"))
    assert undo.diary == ["a", "c", "d"]


async def test_compensations_never_run_after_a_cancellation(run_workflow: Any) -> None:
    undo = Undo()

    @stage()
    async def reacts() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("in reaction")

    @stage()
    async def waits() -> None:
        await anyio.sleep_forever()

    for last in (reacts, waits):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(cancel_when_blocked, scope)
                with contextlib.suppress(StageFailed):
                    await run_workflow(Workflow("w", undo.step("a"), last), RunConfig(on_failure="rollback"))
    assert undo.diary == ["a", "a"]


async def cancel_when_blocked(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()


async def test_a_compensation_that_fails_is_noted_and_the_next_one_runs(run_workflow: Any) -> None:
    undo = Undo()
    steps = [undo.step("a"), undo.step("b", undo=ValueError("cannot")), undo.step("c", error=OSError("no"))]
    with pytest.raises(StageFailed, match="w/c: OSError") as caught:
        await run_workflow(Workflow("w", *steps), RunConfig(on_failure="rollback"))
    assert undo.diary[-1] == "undo w/a"
    assert any("ValueError" in n for n in caught.value.__notes__)


@virtual
async def test_a_compensation_is_bounded_by_the_grace(run_workflow: Any) -> None:
    undo = Undo()

    @stage()
    async def first() -> None: ...

    @first.rollback
    async def hang() -> None:
        await anyio.sleep_forever()

    began = anyio.current_time()
    with pytest.raises(StageFailed) as caught:
        await run_workflow(
            Workflow("w", first, undo.step("c", error=OSError("no"))), RunConfig(on_failure="rollback", grace=4)
        )
    assert anyio.current_time() - began == pytest.approx(4)
    assert "did not end within 4 s" in caught.value.__notes__[0]
