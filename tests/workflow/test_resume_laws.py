"""A law over random workflows: whenever a run dies, and however often, it ends in the state of one that did not.

Trees of stages, sessions, checkpoints, loops, tests, sub-workflows and branches, nested at will; every session's
weights are the list of the steps that made them.
"""

import inspect
import itertools
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_kitchen.errors import CrucibleError, RunPaused
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.testing.memory import MortalMemory
from crucible_kitchen.types import StateRef
from crucible_kitchen.workers import Submissions
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow
from crucible_kitchen.workflow.run import Run, RunContext
from crucible_kitchen.workflow.stage import stage


class Trainer:
    """A session whose weights say which steps were taken; states lie on a disk that outlives it."""

    capabilities = TrainingCapabilities("exact", frozenset({"cross_entropy"}), "honoured", "rollback")

    def __init__(self, disk: dict[str, Any], submissions: Submissions) -> None:
        self._disk, self._submissions = disk, submissions
        self.weights: list[Any] = []

    @property
    def position(self) -> int:
        return len(self.weights)

    async def save_state(self, name: str) -> Any:
        weights = list(self.weights)

        async def write() -> StateRef:
            await anyio.lowlevel.checkpoint()
            self._disk[name] = weights
            return StateRef(name, len(weights))

        return self._submissions.submit(write)

    async def load_state(self, state: StateRef) -> None:
        self.weights = list(self._disk[state.uri])

    async def delete_state(self, state: StateRef) -> None:
        self._disk.pop(state.uri, None)


class World:
    """What outlives a death."""

    def __init__(self, directory: Path) -> None:
        self.memory, self.disk, self.final = MortalMemory(), dict[str, Any](), dict[str, Any]()
        self.directory = directory

    async def attempt(self, workflow: Workflow, budget: int | None, *, draining: bool = False) -> dict[str, Any]:
        memory = self.memory.begin(budget)
        context = RunContext("r", workflow.name, 7, self.directory, memory, memory=memory, draining=draining)
        return await execute(workflow, workflow.config(), {}, context)


class Builder:
    """Draws one workflow; ``built`` gives the same tree over another world."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw
        self._ids = itertools.count(1)
        self.tree = self.block(0, var="x", session=None, fenced=False)

    def block(self, depth: int, *, var: str, session: str | None, fenced: bool) -> list[Any]:
        made = []
        for _ in range(self._draw(st.integers(1, 4))):
            kind = self._draw(st.sampled_from(self._kinds(depth, session=session, fenced=fenced)))
            number = next(self._ids)
            inner = {"var": var, "session": session, "fenced": fenced}
            if kind == "open":
                session = f"s{number}"
                made.append(("open", number, session))
            elif kind in ("plain", "train", "save"):
                made.append((kind, number, var, session))
            elif kind == "loop":
                made.append(("loop", number, self._draw(st.integers(1, 3)), self.block(depth + 1, **inner)))
            elif kind == "when":
                sides = [self.block(depth + 1, **inner) for _ in range(2)]
                made.append(("when", number, var, *sides))
                if session is None and any(_opens(side) for side in sides):
                    session = "perhaps"  # it is open until the block ends, and nobody can read it
            elif kind == "sub":
                made.append(("sub", number, var, self.block(depth + 1, **inner)))
            else:
                fork = {"session": session, "fenced": session is not None}
                parts = [self.block(depth + 1, var=f"x{number}{side}", **fork) for side in "ab"]
                made.append(("fork", number, parts))
        return made

    def _kinds(self, depth: int, *, session: str | None, fenced: bool) -> list[str]:
        kinds = ["plain", "plain"]
        if session is None:
            kinds.append("open")
        elif not fenced:
            kinds += ["save", "save"] + ["train"] * (3 if session != "perhaps" else 0)
        return kinds + (["loop", "loop", "when", "sub", "fork"] if depth < 3 else [])


def _opens(body: list[Any]) -> bool:
    return any(node[0] == "open" or (node[0] == "when" and (_opens(node[3]) or _opens(node[4]))) for node in body)


def built(tree: list[Any], world: World) -> Workflow:
    return Workflow("w", *[_node(spec, world) for spec in tree])


def _node(spec: Any, world: World) -> Any:
    kind, number = spec[0], spec[1]
    if kind == "open":
        return _session(number, spec[2], world)
    if kind in ("plain", "train", "save"):
        return _stage(*spec, world)
    inside = lambda body: [_node(child, world) for child in body]  # noqa: E731
    if kind == "loop":
        return Loop(f"i{number}", lambda: range(spec[2]), *inside(spec[3]))
    if kind == "when":
        test = _reading(lambda x: x % 2 == 0, {spec[2]: (int, 0)}, bool)
        return When(test, *inside(spec[3]), otherwise=inside(spec[4]))
    if kind == "sub":
        return Workflow(f"sub{number}", *inside(spec[3]))
    return Parallel(*[inside(part) for part in spec[2]])


def _session(number: int, name: str, world: World) -> Any:
    @asynccontextmanager
    async def opened(run: Run) -> Any:
        async with Submissions() as submissions:
            trainer = Trainer(world.disk, submissions)
            yield trainer
            world.final[run.path] = list(trainer.weights)

    async def open_session(run: Run) -> Any:
        async with opened(run) as trainer:
            yield trainer

    return stage(writes=name, name=f"open{number}")(open_session)


def _stage(kind: str, number: int, var: str, session: str | None, world: World) -> Any:
    async def work(run: Run, **given: Any) -> int:
        await anyio.lowlevel.checkpoint()
        before = given.get(var, 0)
        draw = int(run.rng().integers(100))
        if kind == "train":
            given[session].weights.append((run.path, before, draw))  # type: ignore[index]
        if kind == "save":
            run.checkpoint()
        return (before * 31 + number + draw) % 1009

    needs = {session: Trainer} if kind == "train" and session is not None else {}

    async def stage_(**given: Any) -> int:
        return await work(**given)

    _sign(stage_, needs, {var: (int, 0)}, int, run=True)
    return stage(writes=var, name=f"{kind}{number}")(stage_)


def _reading(fn: Any, optional: dict[str, Any], returns: Any) -> Any:
    def selector(**given: Any) -> Any:
        return fn(next(iter(given.values())))

    _sign(selector, {}, optional, returns, run=False)
    return selector


def _sign(fn: Any, required: dict[str, Any], optional: dict[str, Any], returns: Any, *, run: bool) -> None:
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("run", kind, annotation=Run)] if run else []
    parameters += [inspect.Parameter(name, kind, annotation=t) for name, t in required.items()]
    parameters += [inspect.Parameter(n, kind, annotation=t, default=d) for n, (t, d) in optional.items()]
    fn.__signature__ = inspect.Signature(parameters, return_annotation=returns)
    fn.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": returns}


@st.composite
def trees(draw: Any) -> list[Any]:
    return Builder(draw).tree


async def _survives(tree: list[Any], deaths: list[float], directory: Path) -> None:
    calm = World(directory)
    workflow = built(tree, calm)
    check(workflow)
    state = await calm.attempt(workflow, None)
    world = World(directory)
    workflow = built(tree, world)
    for death in deaths:
        try:
            await world.attempt(workflow, int(death * calm.memory.writes))
        except CrucibleError:
            continue
    assert await world.attempt(workflow, None) == state
    assert world.final == calm.final


async def _pauses(tree: list[Any], directory: Path) -> None:
    calm, world = World(directory), World(directory)
    state = await calm.attempt(built(tree, calm), None)
    workflow = built(tree, world)
    for _ in range(2000):
        try:
            paused = await world.attempt(workflow, None, draining=True)
            break
        except RunPaused:
            continue
    assert paused == state
    assert world.final == calm.final


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=trees(), deaths=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_a_run_that_died_ends_in_the_state_of_one_that_did_not(
    backend: str, tree: list[Any], deaths: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    anyio.run(_survives, tree, deaths, tmp_path_factory.getbasetemp(), backend=backend)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=trees())
def test_a_run_that_is_paused_after_every_stage_ends_in_the_state_of_one_that_was_not(
    tree: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    anyio.run(_pauses, tree, tmp_path_factory.getbasetemp())
