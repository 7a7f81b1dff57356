"""What a type checker must see of the public types; never run. A line that must be wrong carries its error code."""

from collections.abc import AsyncIterator, Coroutine
from typing import Any, assert_type

from crucible_kitchen.config import RunConfig
from crucible_kitchen.workflow.nodes import Loop, Node, Parallel, When, Workflow
from crucible_kitchen.workflow.run import Run, StateView
from crucible_kitchen.workflow.stage import Resource, Retry, Stage, stage


@stage(writes="total")
async def add(a: int, b: int = 0, *, run: Run) -> str:
    return str(a + b)


@stage(writes="pool", timeout=None)
async def pool(size: int) -> AsyncIterator[list[int]]:
    yield [0] * size


async def uses(run: Run) -> None:
    coroutine: Coroutine[Any, Any, str] = add(1, run=run)
    await coroutine
    assert_type(await add(1, 2, run=run), str)
    assert_type(pool(3), AsyncIterator[list[int]])
    async for numbers in pool(3):
        assert_type(numbers, list[int])
    await add("1", run=run)  # type: ignore[arg-type]
    await add(run=run)  # type: ignore[call-arg]
    pool("3")  # type: ignore[arg-type]
    patient = add.with_(timeout=5, retry=Retry(attempts=2), on_error="skip")
    assert_type(await patient(1, run=run), str)
    assert_type(pool.with_(timeout=1)(3), AsyncIterator[list[int]])
    add.with_(on_error="ignore")  # type: ignore[arg-type]


def is_a_stage(one: Stage[..., str]) -> None: ...


def is_a_resource(one: Resource[[int], list[int]]) -> None: ...


is_a_stage(add)
is_a_stage(pool)  # type: ignore[arg-type]
is_a_resource(pool)
is_a_resource(add)  # type: ignore[arg-type]

nodes: list[Node] = [add, pool, When(lambda: True, add), Loop("i", lambda: [1], pool), Parallel(add, [pool, add])]
workflow = Workflow("w", *nodes, Workflow("inner", add, config=RunConfig), returns=["total"])
assert_type(workflow.without("add"), Workflow)
Workflow("w", uses)  # type: ignore[arg-type]
Loop("i", range(3), add)  # type: ignore[arg-type]

view = StateView({"n": 1})
assert_type(view.get("n", int), int)


@add.validate
def hook(config: RunConfig) -> None: ...


assert_type(hook(RunConfig()), None)


@stage()  # type: ignore[arg-type]
def neither() -> int:
    return 1
