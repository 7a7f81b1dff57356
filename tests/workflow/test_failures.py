"""Which error a run raises: the first failure in time, with its place, its cause, its traceback and its company."""

import itertools
import traceback
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.errors import BackendError, CleanupError, CrucibleError, StageFailed, StoreError
from crucible_kitchen.workflow.nodes import Workflow
from crucible_kitchen.workflow.stage import stage

pytestmark = pytest.mark.anyio


def raises(error: Exception) -> Any:
    async def step() -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    return stage()(step)


async def failure_of(run_workflow: Any, *nodes: Any) -> CrucibleError:
    with pytest.raises(CrucibleError) as caught:
        await run_workflow(Workflow("w", *nodes))
    return caught.value


async def test_a_foreign_error_becomes_ours_with_place_cause_and_traceback(run_workflow: Any) -> None:
    error = await failure_of(run_workflow, raises(KeyError("x")))
    assert (type(error), error.where, error.message) == (StageFailed, "w/step", "KeyError: ...")
    assert isinstance(error.__cause__, KeyError)
    assert "raise error" in "".join(traceback.format_exception(error.__cause__))


async def test_an_error_of_ours_is_raised_as_it_is_with_its_place(run_workflow: Any) -> None:
    original = BackendError("down", hint="wait")
    error = await failure_of(run_workflow, raises(original))
    assert error is original
    assert (str(error), error.hint) == ("w/step: down", "wait")
    assert "in step" in "".join(traceback.format_exception(error))


async def test_an_error_keeps_the_place_it_names_itself(run_workflow: Any) -> None:
    assert (await failure_of(run_workflow, raises(BackendError("x", where="elsewhere")))).where == "elsewhere"


async def test_a_group_of_one_is_that_one(run_workflow: Any) -> None:
    inner = ValueError("x")
    error = await failure_of(run_workflow, raises(ExceptionGroup("g", [ExceptionGroup("h", [inner])])))
    assert error.__cause__ is inner
    assert error.message == "ValueError: ..."


async def test_of_a_group_ours_is_reported_and_the_others_noted_and_the_group_kept(run_workflow: Any) -> None:
    ours = StoreError("full")
    group = ExceptionGroup("g", [ValueError("a"), ours, KeyError("b")])
    error = await failure_of(run_workflow, raises(group))
    assert error is ours
    assert error.__notes__ == ["also failed: ValueError: ...", "also failed: KeyError: ..."]
    assert error.__context__ is group
    foreign = await failure_of(run_workflow, raises(ExceptionGroup("g", [ValueError("a"), KeyError("b")])))
    assert isinstance(foreign.__cause__, ExceptionGroup)
    assert "ValueError: a" in "".join(traceback.format_exception(foreign))


async def test_a_long_message_is_cut(run_workflow: Any) -> None:
    @stage()
    async def talk() -> None:
        raise ValueError("no " * 10_000)

    message = (await failure_of(run_workflow, talk)).message
    assert 300 < len(message) < 400
    assert message.endswith("no no ...")


CASES = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize(("stage_fails", "cancelled", "close_fails"), CASES)
async def test_what_comes_first_is_what_is_reported(  # noqa: C901 - a table of eight cases
    stage_fails: bool, cancelled: bool, close_fails: bool, run_workflow: Any, log: Any
) -> None:
    """The table of failure, cancellation during it, and failure of the clean-up."""
    scope = anyio.CancelScope()

    @stage(writes="r")
    async def resource() -> AsyncIterator[int]:
        yield 1
        await anyio.lowlevel.checkpoint()
        if close_fails:
            raise OSError("close")

    @stage()
    async def work() -> None:
        if cancelled and not stage_fails:
            scope.cancel()
        await anyio.lowlevel.checkpoint()
        if stage_fails:
            if cancelled:
                scope.cancel()  # comes after the failure: it is raised without another checkpoint
            raise ValueError("work")

    outcome: Any = "completed"
    with scope:
        try:
            await run_workflow(Workflow("w", resource, work))
        except CrucibleError as error:
            outcome = error
    if stage_fails:
        assert isinstance(outcome, StageFailed)
        assert isinstance(outcome.__cause__, ValueError)
        assert getattr(outcome, "__notes__", []) == (
            ["also failed: CleanupError: w/resource: failed to close: OSError: close"] if close_fails else []
        )
    elif cancelled:
        assert outcome == "completed"
        assert scope.cancelled_caught
    elif close_fails:
        assert isinstance(outcome, CleanupError)
    else:
        assert outcome == "completed"
    assert log.lines.count("stage.start w/resource/cleanup") == 1
    assert ("stage.error w/resource/cleanup stage.cleanup halt" in log.lines) is close_fails


async def test_a_failure_is_reported_though_the_log_fails_at_that_moment(run_workflow: Any, log: Any) -> None:
    emit = log.emit

    def full(event: Any) -> Any:
        if event.name == "stage.error":
            raise StoreError("no space left")
        return emit(event)

    log.emit = full
    error = await failure_of(run_workflow, raises(ValueError("x")))
    assert isinstance(error.__cause__, ValueError)
    assert "no space left" in error.__notes__[0]


async def test_a_log_that_cannot_be_written_stops_the_run(run_workflow: Any, log: Any) -> None:
    async def sync() -> None:
        raise StoreError("no space left")

    log.sync = sync
    ran = []

    @stage()
    async def first() -> None:
        ran.append(1)

    error = await failure_of(run_workflow, first, first.with_(name="second"))
    assert (str(error), ran) == ("no space left", [1])
