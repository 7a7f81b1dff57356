"""The check: every kind of problem with the stage's path and what to do, and nothing else."""

import functools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import WorkflowError
from crucible_kitchen.ports import Evaluator
from crucible_kitchen.workflow.check import check, ports_of
from crucible_kitchen.workflow.nodes import Loop, Parallel, Positioned, When, Workflow
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage


class Part(RunConfig):
    depth: int = 1


class Whole(Part):
    part: Part = Part()
    number: int = 1


def problems(*nodes: Any, config: type[RunConfig] = Whole, returns: Sequence[str] = (), **options: Any) -> list[str]:
    try:
        check(Workflow("w", *nodes, config=config, returns=returns), **options)
    except WorkflowError as error:
        return list(error.problems)
    return []


@stage(writes="x")
async def x() -> int:
    return 1


@stage(writes="y")
async def y() -> str:
    return ""


@stage(writes="z")
async def z() -> float:
    return 0.5


@stage()
async def read_x(x: int) -> None: ...


@stage()
async def may_read_x(x: int = 0) -> None: ...


@stage(writes="session")
async def session() -> AsyncIterator[int]:
    yield 1


@stage()
async def read_session(session: int) -> None: ...


def flag() -> bool:
    return True


def items() -> list[int]:
    return [1]


SKIPPED = x.with_(on_error="skip")


def test_a_sound_workflow_has_no_problem() -> None:
    body = [x, session, Loop("i", items, read_x, read_session, When(flag, z), until=lambda x, i: True), y]
    assert problems(*body, Parallel([may_read_x], [read_x]), returns=["x", "y"]) == []


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        pytest.param(
            [read_x], "w/read_x: reads 'x', which no stage before it writes; written so far: nothing", id="none"
        ),
        pytest.param(
            [x.with_(writes="xs"), read_x],
            "w/read_x: reads 'x', which no stage before it writes; did you mean 'xs'?",
            id="near",
        ),
        pytest.param(
            [When(flag, x), read_x],
            "w/read_x: reads 'x', which w/x writes on some paths only; "
            "give the parameter a default or write it on every path",
            id="when without otherwise",
        ),
        pytest.param(
            [Loop("i", items, x), read_x],
            "w/read_x: reads 'x', which w/i/x writes on some paths only; "
            "give the parameter a default or write it on every path",
            id="loop's body",
        ),
        pytest.param(
            [SKIPPED, read_x],
            "w/read_x: reads 'x', which w/x writes on some paths only; "
            "give the parameter a default or write it on every path",
            id="skip",
        ),
        pytest.param(
            [Parallel([x], [y], on_error="skip"), read_x],
            "w/read_x: reads 'x', which w/x writes on some paths only; "
            "give the parameter a default or write it on every path",
            id="parallel that skips",
        ),
        pytest.param(
            [Loop("i", items, read_x, x)],
            "w/i/read_x: reads 'x', which only w/i/x writes, later in the loop; give it a default",
            id="later in the loop",
        ),
        pytest.param(
            [Loop("i", items, session), read_session],
            "w/read_session: reads 'session', which was closed when w/i ended",
            id="closed with the turn",
        ),
        pytest.param(
            [Parallel([session]), read_session],
            "w/read_session: reads 'session', which was closed when w ended",
            id="closed with the branch",
        ),
        pytest.param(
            [Loop("i", items, session, until=lambda session: True)],
            "w/i (until): reads 'session', which was closed when w/i ended",
            id="until after the turn",
        ),
        pytest.param(
            [Workflow("inner", x), read_x],
            "w/read_x: reads 'x', which no stage before it writes; written so far: nothing",
            id="not returned",
        ),
        pytest.param(
            [y.with_(writes="x"), read_x], "w/read_x: reads 'x' as int, but w/y writes str", id="read as another type"
        ),
        pytest.param(
            [Loop("i", items, may_read_x, y.with_(writes="x"))],
            "w/i/may_read_x: reads 'x' as int, but w/i/y writes str",
            id="optional read of an earlier turn's value of another type",
        ),
        pytest.param(
            [x, y.with_(writes="x")],
            "w/y: writes 'x' as str, but w/x wrote it as int; a name keeps its type",
            id="type kept",
        ),
        pytest.param(
            [When(flag, x, otherwise=y.with_(writes="x"))],
            "w: w/x writes 'x' as int, w/y as str; a name keeps its type",
            id="type kept on both paths",
        ),
        pytest.param([x.with_(writes="run")], "w/x: writes 'run', which is reserved", id="reserved"),
        pytest.param([x.with_(writes="evaluator")], "w/x: writes 'evaluator', which is reserved", id="a port's name"),
        pytest.param([x.with_(writes="a b")], "w/x: writes 'a b', which is not an identifier", id="no identifier"),
        pytest.param(
            [Loop("x", items, x)], "w/x/x: writes 'x', which is the item of the loop w/x", id="a loop's name written"
        ),
        pytest.param(
            [x.with_(name="set_x"), Loop("x", items, y)],
            "w/x: the loop's name 'x' is already taken here; give it a new one",
            id="loop taken",
        ),
        pytest.param(
            [Loop("i", items, Loop("i", items, x))],
            "w/i/i: the loop's name 'i' is already taken here; give it a new one",
            id="nested loops",
        ),
        pytest.param(
            [Loop("i", items, Loop("x", items, y), x.with_(name="set_x"))],
            "w/i/x: the loop's name 'x' is already taken here; give it a new one",
            id="a loop's name written later in the turn",
        ),
        pytest.param(
            [Loop("config", items, y)],
            "w/config: the loop's name 'config' is already taken here; give it a new one",
            id="loop reserved",
        ),
        pytest.param(
            [session, session.with_(name="again")],
            "w/again: writes 'session', which w/session wrote; a resource has its name to itself until it closes",
            id="two resources of a name",
        ),
        pytest.param(
            [x.with_(writes="session"), Loop("i", items, session)],
            "w/i/session: writes 'session', which w/x wrote; a resource has its name to itself until it closes",
            id="a resource over a value",
        ),
        pytest.param(
            [session, Parallel([x.with_(writes="session")])],
            "w: w/x writes 'session', which is the open resource w/session",
            id="a branch over a resource",
        ),
        pytest.param(
            [Parallel(x, [x.with_(name="x2")])],
            "w: two branches write 'x': w/x and w/x2; branches write different names",
            id="two branches",
        ),
        pytest.param(
            [x, x], "w/x: two nodes here have this name; rename one with .with_(name=...)", id="two of a name"
        ),
        pytest.param(
            [x.with_(name="a/b")], "w/a/b: is named 'a/b'; names have letters, digits, '_', '-' and '.'", id="bad name"
        ),
        pytest.param(
            [len], "w: <built-in function len> is not a node: decorate the coroutine with @stage()", id="node"
        ),
        pytest.param(
            [When(x, y)],  # type: ignore[arg-type]
            "w: the test of a When is a plain function; this one has to be awaited: let a stage write it before",
            id="a stage as a test",
        ),
        pytest.param(
            [Loop("i", range(3), y)],  # type: ignore[arg-type]
            "w/i: what a loop is over is a function, not a range: write `lambda: ...`",
            id="a range as over",
        ),
    ],
)
def test_each_problem_names_its_place_and_what_to_do(nodes: list[Any], expected: str) -> None:
    assert problems(*nodes) == [expected]


def test_all_problems_are_reported_at_once() -> None:
    found = problems(read_x, When(flag, y.with_(writes="config")), x, x)
    assert len(found) == 3


# -- resources and forks --------------------------------------------------------------------------------------------


def test_branches_and_nested_workflows_may_open_resources_of_one_name() -> None:
    other = session.with_(name="other")
    assert problems(Parallel([session, read_session], [other, read_session.with_(name="again")])) == []
    assert problems(session, Parallel([other, read_session])) == []
    assert problems(session, Workflow("inner", session, read_session), read_session) == []


def test_a_branch_may_only_look_at_a_name_on_some_of_its_paths() -> None:
    touching = [When(flag, may_read_x), Loop("i", items, read_x)]
    more = [When(flag, read_x.with_(name="r2")), Loop("j", items, may_read_x)]
    assert problems(x, Parallel(touching, more)) == []


def test_what_an_earlier_writer_made_sure_of_stays_sure() -> None:
    assert problems(x, When(flag, x.with_(name="x2")), SKIPPED.with_(name="x3"), read_x) == []
    assert problems(When(flag, x, otherwise=x.with_(name="x2")), read_x) == []
    assert problems(x, Parallel([x.with_(name="x2")], on_error="skip"), read_x) == []


def test_names_inside_a_nested_workflow_are_its_own_in_loops_too() -> None:
    inner = Workflow("inner", y.with_(writes="x"))
    assert problems(Loop("i", items, may_read_x, inner)) == []


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([When(flag, x)], "w: returns 'x', which it does not write on every path"),
        ([session.with_(writes="x")], "w: returns 'x', which is closed when it ends"),
    ],
)
def test_what_a_workflow_returns_is_written_on_every_path_and_open(nodes: list[Any], text: str) -> None:
    assert problems(*nodes, returns=["x"]) == [text]
    inner = Workflow("inner", *nodes, returns=["x"])
    assert problems(inner) == [text.replace("w:", "w/inner:")]


# -- configs --------------------------------------------------------------------------------------------------------


@stage()
async def use_part(config: Part) -> None: ...


@stage()
async def use_any(config) -> None:  # type: ignore[no-untyped-def]
    ...


def test_a_stage_names_the_smallest_part_of_the_config_it_needs() -> None:
    assert problems(use_part, use_any, config=Whole) == []
    assert problems(use_part, config=RunConfig) == [
        "w/use_part: needs a Part, but the workflow's config is a RunConfig; inherit from it"
    ]


@pytest.mark.parametrize(
    ("field", "outer", "text"),
    [
        (None, Whole, ""),
        (None, RunConfig, "needs a Part, but the outer config is a RunConfig; inherit from it, or nest it with .at"),
        ("part", Whole, ""),
        ("missing", Whole, "takes its config from 'missing', which Whole does not have; add the field"),
        ("number", Whole, "needs a Part, but 'number' is a int"),
    ],
)
def test_a_nested_workflows_config_is_the_outer_one_or_a_field_of_it(
    field: str | None, outer: type[RunConfig], text: str
) -> None:
    inner = Workflow("inner", use_part, config=Part)
    found = problems(inner.at(field) if field else inner, config=outer)
    assert [line for line in found if text in line] if text else found == []


# -- ports ----------------------------------------------------------------------------------------------------------


@stage()
async def judge(evaluator: Evaluator) -> None: ...


@stage()
async def perhaps(evaluator: Evaluator | None, llm_client: Any = None) -> None: ...


@stage()
async def too_early(hub_client: Any) -> None: ...


class Half:
    def public_options(self) -> dict[str, Any]:
        return {}


def test_a_missing_or_incomplete_adapter_is_a_problem() -> None:
    assert problems(judge) == []
    assert problems(judge, adapters={}) == [
        "w/judge: needs an adapter for 'evaluator'; give one: --adapter evaluator=NAME"
    ]
    assert problems(perhaps, adapters={}) == []
    [line] = problems(judge, adapters={"evaluator": Half()})
    assert line.startswith("w: the adapter Half for 'evaluator' lacks aclose, ")
    assert problems(too_early) == ["w/too_early: reads the port 'hub_client', which has no adapters yet"]


def test_the_ports_of_a_workflow_say_which_are_needed() -> None:
    assert ports_of(Workflow("w", judge, perhaps)) == {"evaluator": True, "llm_client": False}
    assert ports_of(Workflow("w", Loop("i", lambda evaluator: [], When(lambda llm_client=None: True, x)))) == {
        "evaluator": True,
        "llm_client": False,
    }


# -- hooks ----------------------------------------------------------------------------------------------------------


def fresh(**options: Any) -> Any:
    async def step() -> int:
        return 1

    return stage(name="step", **options)(step)


def test_a_rollback_stands_outside_loops_and_reads_no_open_resource() -> None:
    async def undo(step: int, session: int) -> None: ...

    looped = fresh(writes="step")
    looped.rollback(lambda: None)
    assert problems(Loop("i", items, looped)) == [
        "w/i/step: has a rollback inside a loop; compensations stand outside loops"
    ]
    reads_live = fresh(writes="step")
    reads_live.rollback(undo)
    assert problems(session, reads_live) == [
        "w/step: its rollback reads 'session', which is closed when it runs; read what it left"
    ]


def test_a_validate_hook_is_a_plain_function_of_config_and_ports() -> None:
    async def wait(config: Whole) -> None: ...

    def state(x: int) -> None: ...

    hooked = fresh()
    hooked.validate(wait)
    hooked.validate(state)
    assert problems(x, hooked) == [
        "w/step: its validate hook is a coroutine; preconditions are plain functions",
        "w/step: its validate hook reads 'x'; before a run there are only config and ports",
    ]


def test_hooks_are_asked_with_the_config_of_their_nested_workflow() -> None:
    seen = []
    hooked = fresh()

    @hooked.validate
    def look(config: Part) -> None:
        seen.append(config)

    inner = Workflow("inner", Loop("i", items, When(flag, Parallel([hooked]))), config=Part).at("part")
    assert problems(inner, config=Whole) == []
    check(Workflow("w", inner, config=Whole), config=Whole(part=Part(depth=5)))
    assert [config.depth for config in seen] == [5]


def test_copies_of_a_stage_share_its_hooks() -> None:
    hooked = fresh()
    copy = hooked.with_(name="copy")
    hooked.validate(lambda config: (_ for _ in ()).throw(ValueError("no")))
    assert problems(copy, config=Whole) == []
    with pytest.raises(WorkflowError, match="w/copy: its validate hook failed: ValueError: no"):
        check(Workflow("w", copy), config=RunConfig())


# -- what is looped over and what can be recorded -------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    a: int


@dataclass
class Mutable:
    a: int


class Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Frozen: ...


@stage()
async def read_item(item: str) -> None: ...


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (list[str], ""),
        (Sequence[str], ""),
        (tuple[str, ...], ""),
        (Positioned[str], ""),
        (Any, ""),
        (object, ""),
        (Rows, ""),
        (list, ""),
        (range, "w/item/read_item: reads 'item' as str, but w/item writes int"),
        (list[int], "w/item/read_item: reads 'item' as str, but w/item writes int"),
        (Iterator[str], "w/item: loops over a collections.abc.Iterator[str]; a Sequence, a range or a Positioned can"),
        (set[str], "w/item: loops over a set[str]; a Sequence, a range or a Positioned can be resumed"),
        (Mapping[str, int], "w/item: loops over a collections.abc.Mapping[str, int]; a Sequence, a range or a Pos"),
    ],
)
def test_what_a_loop_is_over_has_a_position_and_types_its_item(kind: Any, text: str) -> None:
    def over() -> Any: ...

    over.__annotations__["return"] = kind
    found = problems(Loop("item", over, read_item))
    assert found == [] if not text else found[0].startswith(text)


def test_a_plain_stage_writes_what_can_be_recorded() -> None:
    @stage(writes="m")
    async def mutable() -> Mutable:
        return Mutable(1)

    assert problems(mutable) == [
        "w/mutable: writes a Mutable, which cannot be recorded: make it a resource or return a reference"
    ]
    assert problems(stage(writes="m")(session.fn)) == []


# -- functions of all sorts -----------------------------------------------------------------------------------------


class Test:
    def __call__(self, x: int) -> bool:
        return True


def test_selectors_may_be_lambdas_partials_methods_and_callable_objects() -> None:
    def at_least(limit: int, x: int) -> bool:
        return x >= limit

    tests = [lambda x: True, functools.partial(at_least, 3), Test(), Test().__call__]
    for number, test in enumerate(tests):
        assert problems(x, When(test, y)) == [], number
        assert problems(When(test, y)) == ["w: reads 'x', which no stage before it writes; written so far: nothing"], (
            number
        )


def test_what_cannot_be_injected_is_a_problem() -> None:
    @stage()
    async def many(*args: int) -> None: ...

    @stage()
    async def lost(a: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert problems(many) == ["w/many: its parameter 'args' cannot be injected: parameters need names"]
    assert "w/lost: its annotations cannot be resolved (name 'Nowhere' is not defined); import" in problems(lost)[0]


def test_the_run_is_read_everywhere() -> None:
    @stage()
    async def uses(run: Run) -> None: ...

    assert problems(uses, When(lambda run: True, x), Loop("i", lambda run: [], y, until=lambda run: True)) == []
