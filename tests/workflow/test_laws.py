"""Laws over random workflows: what passes the check runs without a wiring error, and runs like ten plain lines.

The model below is the meaning of a workflow without concurrency. A wiring error is a name that is not there.
"""

import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from crucible_kitchen.errors import WorkflowError
from crucible_kitchen.workflow.check import check
from crucible_kitchen.workflow.engine import execute
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow
from crucible_kitchen.workflow.run import Run, RunContext
from crucible_kitchen.workflow.stage import stage

NAMES = ("a", "b", "c")
POOL = (*NAMES, "u1", "u2", "u3", "u4", "i1", "i2", "i3")
Choose = Callable[[str, int], int]


class Flop(Exception):
    """What a flaky stage raises."""


# -- specifications: what is drawn ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Do:
    """A stage or resource."""

    id: int
    writes: str | None
    needs: tuple[str, ...]
    likes: tuple[str, ...]
    live: bool = False
    flaky: str = ""  # its on_error, if it may fail; inside a Parallel that skips every stage may


@dataclass(frozen=True)
class Repeat:
    id: int
    name: str
    body: tuple[Any, ...]


@dataclass(frozen=True)
class Either:
    id: int
    yes: tuple[Any, ...]
    no: tuple[Any, ...]


@dataclass(frozen=True)
class Fork:
    id: int
    branches: tuple[tuple[Any, ...], ...]
    skip: bool


@dataclass(frozen=True)
class Sub:
    id: int
    body: tuple[Any, ...]
    returns: tuple[str, ...]


class Draw:
    """Draws one tree; names that must be fresh are counted."""

    def __init__(self, draw: Any, *, forks: bool) -> None:
        self._draw = draw
        self._forks = forks
        self._ids = itertools.count(1)
        self._fresh = {"u": itertools.count(1), "i": itertools.count(1)}

    def block(self, depth: int, *, branch: bool = False, flop: bool = False) -> tuple[Any, ...]:
        count = self._draw(st.integers(1, 3 if depth else 4))
        return tuple(self.node(depth, branch=branch, flop=flop) for _ in range(count))

    def node(self, depth: int, *, branch: bool, flop: bool) -> Any:
        kinds = ["do", "do"] + (["repeat", "either", "sub"] + ["fork"] * self._forks if depth < 3 else [])
        kind, number = self._draw(st.sampled_from(kinds)), next(self._ids)
        inner = {"branch": branch, "flop": flop}
        if kind == "do":
            return self.do(number, branch=branch, flop=flop)
        if kind == "repeat":
            return Repeat(number, self.fresh("i"), self.block(depth + 1, **inner))
        if kind == "either":
            no = self.block(depth + 1, **inner) if self._draw(st.booleans()) else ()
            return Either(number, self.block(depth + 1, **inner), no)
        if kind == "sub":
            body = self.block(depth + 1, **inner)
            returns = () if branch else tuple(self._draw(st.sets(st.sampled_from(NAMES), max_size=1)))
            return Sub(number, body, returns)
        skip = self._draw(st.booleans())
        branches = [self.block(depth + 1, branch=True, flop=skip or flop) for _ in range(self._draw(st.integers(1, 2)))]
        return Fork(number, tuple(branches), skip)

    def do(self, id: int, *, branch: bool, flop: bool) -> Do:
        live = self._draw(st.integers(0, 4)) == 0
        writes = self.fresh("u") if branch or live else self._draw(st.sampled_from([*NAMES, None]))
        reads = self._draw(st.lists(st.sampled_from(POOL), max_size=2, unique=True))
        cut = self._draw(st.integers(0, len(reads)))
        flaky = self._draw(st.sampled_from(["halt" if flop else "", "skip"]))
        return Do(id, writes, tuple(reads[:cut]), tuple(reads[cut:]), live=live, flaky=flaky)

    def fresh(self, letter: str) -> str:
        return f"{letter}{next(self._fresh[letter])}"


@st.composite
def trees(draw: Any, *, forks: bool) -> tuple[Any, ...]:
    return Draw(draw, forks=forks).block(0)


# -- the model ------------------------------------------------------------------------------------------------------


def value(node: Do, reads: dict[str, Any]) -> int:
    return zlib.crc32(repr((node.id, sorted(reads.items()))).encode())


def model(  # noqa: C901 - the meaning of all nodes in one place
    nodes: tuple[Any, ...], state: dict[str, Any], path: str, choose: Choose
) -> list[str]:
    """Run nodes on the state; return the names of the resources that are open now. KeyError: a wiring error."""
    live: list[str] = []
    for n in nodes:
        if isinstance(n, Do):
            reads = {name: state[name] for name in n.needs} | {name: state.get(name, -1) for name in n.likes}
            if n.flaky and choose(f"{n.id}{path}/s{n.id}", 2):
                if n.flaky == "skip":
                    continue
                raise Flop
            if n.writes:
                state[n.writes] = value(n, reads)
                live += [n.writes] if n.live else []
        elif isinstance(n, Either):
            live += model(n.yes if choose(f"{n.id}{path}", 2) else n.no, state, path, choose)
        elif isinstance(n, Repeat):
            for turn in range(choose(f"{n.id}{path}/{n.name}", 3)):
                state[n.name] = turn
                close(state, model(n.body, state, f"{path}/{n.name}[{turn}]", choose))
            state.pop(n.name, None)
        elif isinstance(n, Sub):
            inner = dict(state)
            opened = model(n.body, inner, f"{path}/w{n.id}", choose)
            close(inner, opened)
            state |= {name: inner[name] for name in n.returns}
        else:
            forks = [dict(state) for _ in n.branches]
            for branch, fork in zip(n.branches, forks, strict=True):
                try:
                    close(fork, model(branch, fork, path, choose))
                except Flop:
                    fork.clear()
                    if not n.skip:
                        raise
            for fork in forks:
                state |= fork
    return live


def close(state: dict[str, Any], names: list[str]) -> None:
    for name in names:
        del state[name]


def outcomes(tree: tuple[Any, ...], limit: int = 400) -> Iterator[str]:
    """Yield, for every way the run can go, ``wired`` or ``wiring error``; ``too many`` if they are."""
    prefix: list[int] | None = []
    for _ in range(limit):
        taken: list[tuple[int, int]] = []

        def choose(_: str, options: int, prefix: list[int] = prefix, taken: list[tuple[int, int]] = taken) -> int:
            pick = prefix[len(taken)] if len(taken) < len(prefix) else 0
            taken.append((pick, options))
            return pick

        try:
            model(tree, {}, "w", choose)
            yield "wired"
        except KeyError:
            yield "wiring error"
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        prefix = [*(pick for pick, _ in taken[:-1]), taken[-1][0] + 1]
    yield "too many"


# -- the workflow ---------------------------------------------------------------------------------------------------


def build(nodes: tuple[Any, ...], choose: Choose) -> list[Any]:
    """Return the real nodes of a specification."""
    return [_node(n, choose) for n in nodes]


def _node(n: Any, choose: Choose) -> Any:
    if isinstance(n, Do):
        return _step(n, choose)
    if isinstance(n, Either):
        return When(
            lambda run: bool(choose(f"{n.id}{run.path}", 2)), *build(n.yes, choose), otherwise=build(n.no, choose)
        )
    if isinstance(n, Repeat):
        return Loop(n.name, lambda run: range(choose(f"{n.id}{run.path}", 3)), *build(n.body, choose))
    if isinstance(n, Sub):
        return Workflow(f"w{n.id}", *build(n.body, choose), returns=n.returns)
    return Parallel(*[build(b, choose) for b in n.branches], on_error="skip" if n.skip else "halt")


def _step(n: Do, choose: Choose) -> Any:
    async def work(run: Run, **reads: Any) -> int:
        await anyio.lowlevel.checkpoint()
        if n.flaky and choose(f"{n.id}{run.path}", 2):
            raise Flop
        return value(n, reads)

    async def opened(run: Run, **reads: Any) -> Any:
        yield await work(run, **reads)

    fn: Any = opened if n.live else work
    P = inspect.Parameter
    needs = [P(name, P.KEYWORD_ONLY) for name in ("run", *n.needs)]
    fn.__signature__ = inspect.Signature([*needs, *(P(name, P.KEYWORD_ONLY, default=-1) for name in n.likes)])
    fn.__annotations__ = {}
    return stage(name=f"s{n.id}", writes=n.writes, on_error="skip" if n.flaky == "skip" else "halt")(fn)


class Silent:
    """A recorder that keeps nothing."""

    def emit(self, event: Any) -> Any:
        return event

    async def drain(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def sync(self) -> None:
        await anyio.lowlevel.checkpoint()


async def run(tree: tuple[Any, ...], choose: Choose) -> dict[str, Any]:
    workflow = Workflow("w", *build(tree, choose))
    context = RunContext("r", "w", 0, Path(), Silent())
    return await execute(workflow, workflow.config(), {}, context)


def by_place(salt: int) -> Choose:
    return lambda place, options: zlib.crc32(f"{salt}{place}".encode()) % options


# -- the laws -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees(forks=True))
def test_the_check_passes_exactly_the_workflows_that_cannot_have_a_wiring_error(tree: tuple[Any, ...]) -> None:
    seen = set(outcomes(tree))
    assume("too many" not in seen or "wiring error" in seen)
    problems: tuple[str, ...] = ()
    try:
        check(Workflow("w", *build(tree, by_place(0))))
    except WorkflowError as error:
        problems = error.problems
    assert all("reads" in p or "returns" in p for p in problems)
    assert bool(problems) == ("wiring error" in seen)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("forks", [False, True], ids=["sequential", "independent branches"])
def test_a_run_equals_the_sequential_model(backend: str, forks: bool) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(trees(forks=forks), st.integers(0, 1000))
    def law(tree: tuple[Any, ...], salt: int) -> None:
        choose, expected = by_place(salt), dict[str, Any]()
        try:
            close(expected, model(tree, expected, "w", choose))
        except KeyError:
            return  # not a checked workflow
        assert anyio.run(run, tree, choose, backend=backend) == expected

    law()
