"""What a stage reads and writes, as it runs: state, loops' items, ports, config, optional reads."""

from typing import Any

import anyio
import pytest

from crucible_kitchen.config import RunConfig
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow
from crucible_kitchen.workflow.run import Run, StateView
from crucible_kitchen.workflow.stage import Resource, Stage, stage

pytestmark = pytest.mark.anyio


class Outer(RunConfig):
    size: int = 3
    inner: "Inner" = None  # type: ignore[assignment]


class Inner(RunConfig):
    width: int = 5


Outer.model_rebuild()


@stage(writes="x")
async def one() -> int:
    return 1


@stage(writes="total")
async def add(item: int, total: int = 0) -> int:
    return total + item


def test_a_stage_is_called_like_the_coroutine_it_is() -> None:
    async def body(a: int, b: str = "") -> str:
        return f"{a}{b}"

    made = stage(writes="z")(body)
    assert isinstance(made, Stage)
    assert made.name == "body"
    assert anyio.run(made, 1, "b") == "1b"


def test_an_async_generator_becomes_a_resource() -> None:
    @stage(writes="pool")
    async def pool() -> Any:
        """Open a pool.

        More.
        """
        yield 1

    assert isinstance(pool, Resource)
    assert pool.doc == "Open a pool."


def test_a_plain_function_is_refused_as_a_stage() -> None:
    with pytest.raises(TypeError, match="neither a coroutine nor an async generator: write `async def`"):
        stage()(lambda: None)  # type: ignore[call-overload]


async def test_state_flows_by_name_and_a_loop_gives_its_item(run_workflow: Any) -> None:
    state = await run_workflow(Workflow("w", Loop("item", lambda: [5, 6, 7], add)))
    assert state == {"total": 18}


async def test_an_optional_read_sees_what_a_later_stage_of_the_turn_before_wrote(run_workflow: Any) -> None:
    seen = []

    @stage()
    async def early(last: int = -1) -> None:
        seen.append(last)

    @stage(writes="last")
    async def late(item: int) -> int:
        return item

    await run_workflow(Workflow("w", Loop("item", lambda: range(3), early, late)))
    assert seen == [-1, 0, 1]


async def test_config_ports_and_run_are_injected_by_their_names(run_workflow: Any, log: Any) -> None:
    seen: dict[str, Any] = {}

    @stage()
    async def look(config: Outer, run: Run, evaluator: Any, llm_client: Any = None) -> None:
        seen.update(config=config, run=run, evaluator=evaluator, llm=llm_client)

    workflow = Workflow("w", Loop("item", lambda config: range(config.size), look), config=Outer)
    await run_workflow(workflow, Outer(size=2), {"evaluator": "E"})
    assert (seen["config"].size, seen["evaluator"], seen["llm"]) == (2, "E", None)
    assert seen["run"].path == "w/item[1]/look"
    assert seen["run"].turn("item") == 1
    with pytest.raises(LookupError, match="stands in no loop 'epoch'; loops here: item"):
        seen["run"].turn("epoch")


async def test_a_port_given_as_none_is_its_default(run_workflow: Any) -> None:
    seen = []

    @stage()
    async def look(evaluator: Any = "fallback") -> None:
        seen.append(evaluator)

    await run_workflow(Workflow("w", look), adapters={"evaluator": None})
    assert seen == ["fallback"]


async def test_random_numbers_and_keys_depend_on_seed_place_turn_and_name_only(run_workflow: Any) -> None:
    draws: dict[str, Any] = {}

    @stage()
    async def draw(run: Run) -> None:
        draws[run.path] = (run.rng("a").random(), run.rng("b").random(), run.idempotency_key)

    workflow = Workflow("w", Loop("i", lambda: range(2), draw))
    await run_workflow(workflow)
    first = dict(draws)
    await run_workflow(workflow)
    assert draws == first
    assert len({n for values in draws.values() for n in values}) == 6


@pytest.mark.parametrize(("flag", "expected"), [(True, {"x": 1}), (False, {"x": 2})])
async def test_when_runs_its_body_or_otherwise(flag: bool, expected: dict[str, int], run_workflow: Any) -> None:
    @stage(writes="x")
    async def two() -> int:
        return 2

    assert await run_workflow(Workflow("w", When(lambda: flag, one, otherwise=two))) == expected


async def test_a_workflow_nested_in_another_shows_only_what_it_returns(run_workflow: Any) -> None:
    @stage(writes="y")
    async def double(x: int) -> int:
        return 2 * x

    @stage(writes="hidden")
    async def hide(y: int) -> int:
        return y

    inner = Workflow("inner", double, hide, returns=["y"])
    assert await run_workflow(Workflow("w", one, inner)) == {"x": 1, "y": 2}


async def test_a_nested_workflow_takes_a_field_of_the_outer_config(run_workflow: Any) -> None:
    @stage(writes="width")
    async def width(config: Inner, run: Run) -> int:
        assert run.path == "w/inner/width"
        return config.width

    inner = Workflow("inner", width, config=Inner, returns=["width"])
    outer = Workflow("w", inner.at("inner"), config=Outer)
    assert await run_workflow(outer, Outer(inner=Inner(width=9))) == {"width": 9}


async def test_a_nested_workflow_cannot_change_what_it_does_not_return(run_workflow: Any) -> None:
    @stage(writes="x")
    async def change(x: int) -> int:
        return x + 1

    inner = Workflow("inner", change)
    assert await run_workflow(Workflow("w", one, inner)) == {"x": 1}


async def test_branches_read_the_state_at_the_fork_and_write_into_copies(run_workflow: Any) -> None:
    seen = []

    @stage(writes="a")
    async def write_a(x: int) -> int:
        return x + 1

    @stage(writes="b")
    async def write_b(a: int = -1) -> int:
        await anyio.lowlevel.checkpoint()
        seen.append(a)
        return 5

    assert await run_workflow(Workflow("w", one, Parallel(write_a, write_b))) == {"x": 1, "a": 2, "b": 5}
    assert seen == [-1]


async def test_a_selector_that_fails_is_reported_with_its_place(run_workflow: Any) -> None:
    def bad() -> Any:
        raise ValueError("no list")

    with pytest.raises(Exception, match="w/i: ValueError: no list") as caught:
        await run_workflow(Workflow("w", Loop("i", bad, one)))
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_state_is_read_by_attribute_item_or_type_and_never_written() -> None:
    view = StateView({"a": 1})
    assert (view.a, view["a"], view.get("a", int), "a" in view, list(view), len(view)) == (1, 1, 1, True, ["a"], 1)
    with pytest.raises(AttributeError, match="no stage wrote 'b'; written: a"):
        _ = view.b
    with pytest.raises(KeyError):
        view["b"]
    with pytest.raises(TypeError, match="'a' is a int, not a str"):
        view.get("a", str)
    with pytest.raises(AttributeError, match="read-only"):
        view.a = 2
