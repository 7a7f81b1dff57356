"""A run that dies at any write and is resumed ends like one that was never disturbed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import CrucibleError, IntegrityError, ReplayMismatch, RunPaused, StageFailed, StageTimeout
from crucible_kitchen.events import WorkflowRolledBack
from crucible_kitchen.ports import TrainingCapabilities
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.testing.memory import MortalMemory
from crucible_kitchen.types import StateRef
from crucible_kitchen.workers import Submissions
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.memory import Keep
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow
from crucible_kitchen.workflow.run import Run, RunContext
from crucible_kitchen.workflow.stage import stage

pytestmark = pytest.mark.anyio

virtual = pytest.mark.parametrize("anyio_backend", [virtual_clock()], ids=["virtual"])
ROLLBACK = TrainingCapabilities("exact", frozenset({"cross_entropy"}), "honoured", "rollback")


class Trainer:
    """A session whose weights are the list of the steps applied to them; states lie on ``disk``."""

    capabilities = ROLLBACK

    def __init__(self, disk, submissions, name=""):
        self._disk = disk
        self._submissions = submissions
        self.name = name
        self.weights = []

    @property
    def position(self):
        return len(self.weights)

    async def step(self, what):
        await anyio.lowlevel.checkpoint()
        self.weights.append(what)

    async def save_state(self, name):
        weights = list(self.weights)

        async def write():
            await anyio.lowlevel.checkpoint()
            self._disk[f"{self.name}/{name}"] = weights
            return StateRef(f"{self.name}/{name}", len(weights))

        return self._submissions.submit(write)

    async def load_state(self, state):
        if state.uri not in self._disk:
            raise IntegrityError(f"{state.uri} is gone")
        self.weights = list(self._disk[state.uri])

    async def delete_state(self, state):
        self._disk.pop(state.uri, None)


@asynccontextmanager
async def trainer(disk, name="") -> AsyncIterator[Trainer]:
    async with Submissions() as submissions:
        yield Trainer(disk, submissions, name)


@dataclass(frozen=True)
class Mean:
    total: float = 0.0
    steps: int = 0


class World:
    """What outlives a run's death: its memory, the disk, and a list of what really ran."""

    def __init__(self, tmp_path):
        self.memory = MortalMemory()
        self.disk = {}
        self.ran = []
        self.final = {}
        self.directory = tmp_path

    async def attempt(self, workflow, *, budget=None, draining=False, config=None):
        memory = self.memory.begin(budget)
        context = RunContext("r", workflow.name, 7, self.directory, memory, memory=memory, draining=draining)
        return await execute(workflow, config or workflow.config(), {}, context)

    async def to_the_end(self, workflow, budget):
        """Die after ``budget`` writes, resume until the run completes, and return its state."""
        check(workflow)
        try:
            return await self.attempt(workflow, budget=budget)
        except CrucibleError:
            pass
        return await self.attempt(workflow)


def supervised(world, every=2, steps=3, epochs=2):
    @stage(writes="rows")
    async def load(run: Run) -> list[int]:
        world.ran.append("load")
        return list(range(steps))

    @stage(writes="session")
    async def init_session() -> AsyncIterator[Trainer]:
        async with trainer(world.disk) as session:
            yield session

    @stage(writes="data")
    async def build(rows: list[int]) -> AsyncIterator[list[int]]:
        yield [row * 10 for row in rows]

    @stage(writes="mean")
    async def train(session: Trainer, batch: int, run: Run, mean: Mean = Mean()) -> Mean:
        index = run.turn("epoch") * steps + run.turn("batch")
        assert session.position == index, f"step {index} at {session.position}"
        world.ran.append(index)
        draw = int(run.rng("noise").integers(1000))
        await session.step((run.turn("epoch"), batch, draw))
        return Mean(mean.total + batch + draw, mean.steps + 1)

    @stage()
    async def save(run: Run) -> None:
        run.checkpoint(Keep(last=2))

    @stage(writes="best")
    async def measure(session: Trainer, mean: Mean, best: float = 0.0) -> float:
        return max(best, mean.total / mean.steps)

    @stage(writes="result")
    async def finish(session: Trainer, mean: Mean = Mean(), best: float = 0.0) -> dict[str, Any]:
        world.final["weights"] = list(session.weights)
        return {"mean": mean.total, "best": best}

    def due(session: Trainer) -> bool:
        return session.position % every == 0

    return Workflow(
        "w",
        load,
        init_session,
        build,
        Loop(
            "epoch",
            lambda: range(epochs),
            Loop("batch", lambda data: data, train, When(due, measure, save)),
        ),
        finish,
    )


async def control(tmp_path, build):
    world = World(tmp_path)
    state = await world.attempt(build(world))
    return state, world


async def sweep(tmp_path, build, compare):
    """Die after every possible number of writes; each time the resumed run must end like the undisturbed one."""
    state, calm = await control(tmp_path, build)
    for budget in range(calm.memory.writes):
        world = World(tmp_path)
        resumed = await world.to_the_end(build(world), budget)
        compare(calm, state, world, resumed, budget)
    return calm.memory.writes


async def test_a_training_run_that_dies_at_any_write_ends_with_the_same_weights_and_state(tmp_path):
    def compare(calm, state, world, resumed, budget):
        assert world.final == calm.final, budget
        assert resumed == state, budget
        assert world.ran.count("load") <= 2, budget

    writes = await sweep(tmp_path, supervised, compare)
    assert writes > 40


async def test_resuming_goes_back_to_the_newest_checkpoint_and_no_further(tmp_path):
    world = World(tmp_path)
    workflow = supervised(world, every=2, steps=4, epochs=2)
    _, calm = await control(tmp_path, lambda w: supervised(w, every=2, steps=4, epochs=2))
    with pytest.raises(CrucibleError):
        await world.attempt(workflow, budget=calm.memory.writes - 8)
    loaded = world.memory.checkpoints()[0]
    assert loaded.step == 6
    world.ran.clear()
    await world.attempt(workflow)
    assert world.ran == [6, 7]
    assert [e.step for e in world.memory.events if isinstance(e, WorkflowRolledBack)] == [6]
    assert world.final == calm.final


async def test_dying_again_while_resuming_changes_nothing(tmp_path):
    _, calm = await control(tmp_path, supervised)
    for first in range(8, calm.memory.writes, 7):
        for second in range(0, 20, 3):
            world = World(tmp_path)
            workflow = supervised(world)
            for budget in (first, second, second, None):
                try:
                    await world.attempt(workflow, budget=budget)
                except CrucibleError:
                    continue
            assert world.final == calm.final, (first, second)


async def test_a_drained_run_stops_at_a_checkpoint_and_goes_on_from_there(tmp_path):
    state, calm = await control(tmp_path, supervised)
    world = World(tmp_path)
    workflow = supervised(world)
    pauses = 0
    while True:
        try:
            resumed = await world.attempt(workflow, draining=True)
            break
        except RunPaused:
            pauses += 1
            assert pauses < 100
    assert pauses > 6, "it did not stop after every stage"
    assert world.final == calm.final
    assert resumed == state


def nested(world):
    """Two sub-workflows with sessions of their own, one after the other, the second fed by the first."""

    def part(name, start):
        @stage(writes=f"{name}_session", name="init_session")
        async def init_session() -> AsyncIterator[Trainer]:
            async with trainer(world.disk, name) as session:
                yield session

        async def train_(run: Run, **given: Any) -> int:
            session = given[f"{name}_session"]
            await session.step((name, run.turn("turn"), given.get("first_done", 0)))
            return session.position

        train = _reading(train_, {f"{name}_session": Trainer}, {"first_done": (int, 0)}, int)
        train = stage(writes=f"{name}_at", name="train")(train)

        @stage()
        async def save(run: Run) -> None:
            run.checkpoint()

        async def done_(run: Run, **given: Any) -> int:
            world.final[name] = list(given[f"{name}_session"].weights)
            return len(world.final[name]) + start

        done = stage(writes=f"{name}_done", name="done")(
            _reading(done_, {f"{name}_session": Trainer}, {f"{name}_at": (int, 0)}, int)
        )
        return Workflow(
            name, init_session, Loop("turn", lambda: range(3), train, save), done, returns=(f"{name}_done",)
        )

    @stage(writes="sum")
    async def add(first_done: int, second_done: int) -> int:
        world.ran.append("add")
        return first_done + second_done

    return Workflow("w", part("first", 100), part("second", 1000), add)


def _reading(fn, required, optional, returns):
    """Give a coroutine of ``**given`` the parameters that the engine injects."""
    import inspect

    async def stage_(**given):
        run = given.pop("run")
        return await fn(run, **given)

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("run", kind, annotation=Run)]
    parameters += [inspect.Parameter(n, kind, annotation=t) for n, t in required.items()]
    parameters += [inspect.Parameter(n, kind, annotation=t, default=d) for n, (t, d) in optional.items()]
    stage_.__signature__ = inspect.Signature(parameters, return_annotation=returns)
    stage_.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": returns}
    return stage_


async def test_sub_workflows_with_their_own_sessions_resume_each_on_its_own(tmp_path):
    def compare(calm, state, world, resumed, budget):
        assert world.final.keys() <= calm.final.keys(), budget
        assert all(world.final[name] == calm.final[name] for name in world.final), budget
        assert resumed == state, budget

    assert await sweep(tmp_path, nested, compare) > 30


def unmoved(world):
    """A session's block that writes the very value it found, and a stage after it that reads it."""

    @stage(writes="x")
    async def first() -> int:
        return 1

    @stage(writes="session")
    async def init_session() -> AsyncIterator[Trainer]:
        async with trainer(world.disk) as session:
            yield session

    @stage(writes="x")
    async def same(session: Trainer, x: int) -> int:
        return x

    @stage(writes="y")
    async def after(x: int) -> int:
        return x + 1

    return Workflow("w", first, Loop("once", lambda: range(1), init_session, same), after)


async def test_a_session_that_writes_the_very_value_it_found_is_found_done(tmp_path):
    def compare(calm, state, world, resumed, budget):
        assert resumed == state == {"x": 1, "y": 2}, budget

    assert await sweep(tmp_path, unmoved, compare) > 8


async def test_a_sub_workflow_that_is_done_is_not_run_again(tmp_path):
    world = World(tmp_path)
    workflow = nested(world)
    _, calm = await control(tmp_path, nested)
    with pytest.raises(CrucibleError):
        await world.attempt(workflow, budget=calm.memory.writes - 4)
    world.final.clear()
    await world.attempt(workflow)
    assert "first" not in world.final


def parallel(world):
    """Branches that own their sessions."""

    def own(name, count):
        @stage(writes=f"{name}_session", name=f"{name}_open")
        async def init_session() -> AsyncIterator[Trainer]:
            async with trainer(world.disk, name) as session:
                yield session

        async def train_(run: Run, **given: Any) -> int:
            await given[f"{name}_session"].step((name, run.turn(f"{name}_turn")))
            return 1

        async def done_(run: Run, **given: Any) -> int:
            world.final[name] = list(given[f"{name}_session"].weights)
            return len(world.final[name])

        @stage(name="save")
        async def save(run: Run) -> None:
            run.checkpoint()

        train = stage(writes=f"{name}_one", name="train")(_reading(train_, {f"{name}_session": Trainer}, {}, int))
        done = stage(writes=f"{name}_count", name=f"{name}_done")(
            _reading(done_, {f"{name}_session": Trainer}, {}, int)
        )
        return [init_session, Loop(f"{name}_turn", lambda: range(count), train, save), done]

    @stage(writes="plain")
    async def plain() -> int:
        world.ran.append("plain")
        await anyio.lowlevel.checkpoint()
        return 7

    @stage(writes="sum")
    async def add(a_count: int, b_count: int, plain: int) -> int:
        return a_count + b_count + plain

    return Workflow("w", Parallel(own("a", 3), own("b", 2), plain), add)


async def test_branches_that_own_their_sessions_resume_each_from_its_own_checkpoint(tmp_path):
    def compare(calm, state, world, resumed, budget):
        assert all(world.final[name] == calm.final[name] for name in world.final), budget
        assert resumed == state, budget

    assert await sweep(tmp_path, parallel, compare) > 30


async def test_a_drained_run_lets_every_branch_reach_its_checkpoint(tmp_path):
    state, _ = await control(tmp_path, parallel)
    world = World(tmp_path)
    workflow = parallel(world)
    for _ in range(40):
        try:
            resumed = await world.attempt(workflow, draining=True)
            break
        except RunPaused:
            continue
    assert resumed == state


async def test_a_shared_session_cannot_be_saved_inside_a_parallel(tmp_path):
    world = World(tmp_path)

    @stage(writes="session")
    async def init_session() -> AsyncIterator[Trainer]:
        async with trainer(world.disk) as session:
            yield session

    @stage()
    async def save(run: Run) -> None:
        run.checkpoint()

    @stage()
    async def other() -> None: ...

    with pytest.raises(StageFailed, match="opened outside a Parallel"):
        await world.attempt(Workflow("w", init_session, Parallel(save, other)))


async def test_a_damaged_state_is_passed_over_for_the_checkpoint_before_it(tmp_path):
    _, calm = await control(tmp_path, supervised)
    world = World(tmp_path)
    workflow = supervised(world)
    with pytest.raises(CrucibleError):
        await world.attempt(workflow, budget=calm.memory.writes - 8)
    newest, before = world.memory.checkpoints()[:2]
    world.disk.pop(next(iter(newest.states.values())).uri)
    await world.attempt(workflow)
    assert world.final == calm.final
    assert before.step < newest.step


async def test_old_checkpoints_and_their_states_are_deleted(tmp_path):
    world = World(tmp_path)
    await world.attempt(supervised(world, every=1, steps=4, epochs=3))
    assert len(world.memory.saved) == 2
    assert len(world.disk) == 2


async def test_a_record_that_does_not_fit_the_workflow_any_more_is_a_named_error(tmp_path):
    def build(extra):
        @stage(writes="x")
        async def first() -> int:
            return extra

        @stage(writes="y")
        async def second(x: int) -> int:
            return x + 1

        @stage()
        async def third(y: int) -> None:
            raise StageFailed("not yet")

        return first, second, third

    world = World(tmp_path)
    first, second, third = build(1)
    with pytest.raises(StageFailed):
        await world.attempt(Workflow("w", first, second, third))
    del world.memory.records["w/first"]
    first, second, third = build(2)
    with pytest.raises(ReplayMismatch, match="w/second is recorded, but the state it reads is not what it was"):
        await world.attempt(Workflow("w", first, second, third))


async def test_a_changed_config_is_a_named_error_at_the_stage_that_reads_it(tmp_path):
    class Config(RunConfig):
        size: int = 1

    @stage(writes="x")
    async def first(config: Config) -> int:
        return config.size

    @stage()
    async def second(x: int) -> None:
        raise StageFailed("not yet")

    world = World(tmp_path)
    workflow = Workflow("w", first, second, config=Config)
    with pytest.raises(StageFailed):
        await world.attempt(workflow)
    with pytest.raises(ReplayMismatch, match="its config"):
        await world.attempt(workflow, config=Config(size=2))


async def test_a_skipped_stage_is_skipped_again(tmp_path):
    world = World(tmp_path)

    @stage(writes="x", on_error="skip")
    async def sometimes() -> int:
        world.ran.append("sometimes")
        if len(world.ran) == 1:
            raise StageFailed("once")
        return 1

    @stage(writes="y")
    async def after(x: int = 0) -> int:
        return x

    @stage()
    async def last(y: int) -> None:
        if world.memory.attempt == 1:
            raise StageFailed("not yet")

    workflow = Workflow("w", sometimes, after, last)
    with pytest.raises(StageFailed):
        await world.attempt(workflow)
    assert (await world.attempt(workflow))["y"] == 0
    assert world.ran == ["sometimes"]


async def test_a_value_that_cannot_be_recorded_is_an_error_that_names_its_stage(tmp_path):
    @stage(writes="x")
    async def odd():
        return object()

    with pytest.raises(StageFailed, match="'x' cannot be recorded: object is not JSON") as caught:
        await World(tmp_path).attempt(Workflow("w", odd))
    assert caught.value.where == "w/odd"


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (Keep(last=1), [12]),
        (Keep(last=3), [10, 11, 12]),
        (Keep(last=1, every=5), [5, 10, 12]),
        (Keep(last=1, best=2), [4, 8, 12]),
    ],
)
async def test_which_checkpoints_are_kept_is_a_policy(tmp_path, keep, steps):
    world = World(tmp_path)

    @stage()
    async def save(session: Trainer, run: Run) -> None:
        run.checkpoint(replace(keep, score={4: 0.9, 8: 0.8}.get(session.position, 0.1)))

    await world.attempt(supervised(world, every=1, steps=4, epochs=3).replace("save", save))
    assert sorted(saved.step for saved in world.memory.saved.values()) == steps
    assert len(world.disk) == len(steps)


@virtual
@pytest.mark.parametrize(
    ("hangs", "says"), [("order", "begun"), ("write", "saved"), ("delete", "deleted"), ("load", "loaded")]
)
async def test_a_backend_that_hangs_over_a_checkpoint_has_as_long_as_a_stage(tmp_path, monkeypatch, hangs, says):
    world = World(tmp_path)
    workflow = supervised(world, every=1)
    if hangs == "load":
        while not world.disk:
            with pytest.raises(RunPaused):
                await world.attempt(workflow, draining=True)

    async def forever(*_):
        await anyio.sleep_forever()

    async def save(self, name):
        return self._submissions.submit(forever)

    method, instead = {
        "order": ("save_state", forever),
        "write": ("save_state", save),
        "delete": ("delete_state", forever),
        "load": ("load_state", forever),
    }[hangs]
    monkeypatch.setattr(Trainer, method, instead)
    began = anyio.current_time()
    with pytest.raises(StageTimeout, match=f"{says} within 50 s") as caught:
        await world.attempt(workflow, config=RunConfig(stage_timeout=50))
    assert caught.value.where
    assert anyio.current_time() - began == pytest.approx(50, abs=1)
