"""What every environment must do: its problems, its groups, its episodes. Knows no rollout.

Read next: ``crucible_kitchen.ports.environment``.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
import numpy as np

from crucible_kitchen.errors import EnvironmentFault
from crucible_kitchen.ports.environment import (
    Action,
    Environment,
    EnvironmentGroup,
    EnvironmentSource,
    Episode,
    Observation,
    VectorEnvironment,
)
from crucible_kitchen.testing.contracts.base import skip

__all__ = ["ENVIRONMENT", "EnvironmentCase"]

MOST_TURNS = 2000
"""An episode that has not ended by then never will."""


@dataclass(frozen=True, slots=True)
class EnvironmentCase:
    """A source, made anew by every call, and what a policy might say to it.

    Attributes:
        source: returns a new source with equal options.
        answer: an action's text.
    """

    source: Callable[[], EnvironmentSource]
    answer: str = "1"


async def problems_are_counted_and_have_a_fingerprint(case: EnvironmentCase) -> None:
    """Equal options give equal problems."""
    one, other = case.source(), case.source()
    assert len(one) == len(other) >= 1, f"{len(one)} and {len(other)} problems"
    assert await one.fingerprint() == await other.fingerprint(), "equal options, unequal fingerprints"
    assert one.name, "a source has a name"
    await one.aclose()
    await other.aclose()


async def a_problem_is_the_same_wherever_it_is_opened(case: EnvironmentCase) -> None:
    """Equal problem, seed and options give equal first observations, in every source."""
    found = []
    for source in (case.source(), case.source()):
        group = await source.open(len(source) - 1, 2, 7)
        found.append(await _first(group))
        await group.aclose()
        await source.aclose()
    assert found[0] == found[1], "one problem, two beginnings"


async def there_is_no_problem_beyond_the_last(case: EnvironmentCase) -> None:
    """An index out of range is refused."""
    source = case.source()
    try:
        group = await source.open(len(source), 1, 0)
    except (IndexError, EnvironmentFault):
        return
    finally:
        await source.aclose()
    await group.aclose()
    raise AssertionError("a problem beyond the last was opened")


async def a_group_is_of_the_kind_that_its_space_says(case: EnvironmentCase) -> None:
    """Language has no space; a vector environment has one."""
    source = case.source()
    group = await source.open(0, 3, 0)
    if source.space is None:
        assert isinstance(group, EnvironmentGroup), "language environments come as a group"
        assert len(group.environments) == 3
    else:
        assert isinstance(group, VectorEnvironment)
        assert group.size == 3
    await group.aclose()
    await source.aclose()


async def episodes_end_and_their_rewards_are_finite(case: EnvironmentCase) -> None:
    """Each member is asked, answers, and is told what that was worth, until it is over."""
    source = case.source()
    group = await source.open(0, 2, 0)
    if isinstance(group, VectorEnvironment):
        await group.aclose()
        await source.aclose()
        skip("it is a vector environment")
    episodes: list[Episode] = []

    async def play(member: int, environment: Environment) -> None:
        episodes.append(await _episode(member, environment, case.answer))

    async with anyio.create_task_group() as tasks:
        for member, environment in enumerate(group.environments):
            tasks.start_soon(play, member, environment)
    rewards = await group.group_rewards(sorted(episodes, key=lambda e: e.member))
    assert len(rewards) == 2, f"{len(rewards)} group rewards for 2 episodes"
    assert all(math.isfinite(r) for r in rewards), "a group reward is not finite"
    assert len(await group.group_rewards(episodes[:1])) == 1, "members may be missing when rewards are compared"
    await group.aclose()
    await source.aclose()


async def vector_steps_have_the_shapes_and_ends_that_are_promised(case: EnvironmentCase) -> None:
    """Observations are [G, D] before any reset; what is not stepped stays; the same again leads to the same."""
    source = case.source()
    space = source.space
    if space is None:
        await source.aclose()
        skip("it is a language environment")
    group = await source.open(0, 3, 0)
    assert isinstance(group, VectorEnvironment)
    rng = np.random.default_rng(0)
    observations = np.asarray(await group.reset(np.zeros(3, np.int64)))
    over = np.zeros(3, dtype=bool)
    for _ in range(MOST_TURNS):
        assert observations.shape == (3, space.features), f"observations of shape {observations.shape}"
        assert np.isfinite(observations).all(), "an observation is not finite"
        moved = await group.step(np.where(over, -1, rng.integers(space.actions, size=3)))
        for values in (moved.rewards, moved.terminated, moved.truncated):
            assert np.shape(values) == (3,), f"an array of shape {np.shape(values)} for 3 members"
        assert np.isfinite(np.asarray(moved.rewards)[~over]).all(), "a reward is not finite"
        before, observations = observations, np.asarray(moved.observations)
        assert np.array_equal(observations[over], before[over]), "a member without an action moved"
        over |= np.asarray(moved.terminated, bool) | np.asarray(moved.truncated, bool)
        if over.all():
            break
    await group.aclose()
    await source.aclose()


async def vector_episodes_are_numbered_and_can_be_repeated(case: EnvironmentCase) -> None:
    """Equal episodes and actions lead to equal observations, whatever was done before."""
    source = case.source()
    space = source.space
    if space is None:
        await source.aclose()
        skip("it is a language environment")
    found = []
    for detour in (False, True):
        group = await source.open(0, 2, 5)
        assert isinstance(group, VectorEnvironment)
        if detour:
            await group.reset(np.array([0, 0]))
            await group.step(np.array([0, 0]))
        await group.reset(np.array([3, 0]))
        after = await group.step(np.array([0, space.actions - 1]))
        seen = np.asarray(await group.reset(np.array([-1, 1])))
        assert np.array_equal(seen[0], np.asarray(after.observations)[0]), "a member that was not reset moved"
        found.append(seen.tolist())
        await group.aclose()
    await source.aclose()
    assert found[0] == found[1], "one episode, two courses"


async def held_out_problems_are_others_and_have_none_themselves(case: EnvironmentCase) -> None:
    """What is measured on is never trained on."""
    source = case.source()
    held = source.held_out()
    if held is None:
        await source.aclose()
        skip("nothing is held out")
    assert len(held) >= 1
    assert await held.fingerprint() != await source.fingerprint(), "held-out problems are the training problems"
    assert held.held_out() is None, "held-out problems hold others out"
    await held.aclose()
    await source.aclose()


async def closing_twice_is_harmless(case: EnvironmentCase) -> None:
    """``aclose`` is idempotent, of groups and sources."""
    source = case.source()
    group = await source.open(0, 1, 0)
    for part in (group, group, source, source):
        await part.aclose()


async def groups_are_opened_and_closed_concurrently(case: EnvironmentCase) -> None:
    """Several groups at once, one of them cancelled while it is opened or begun."""
    source = case.source()

    async def begin(problem: int) -> None:
        group = await source.open(problem % len(source), 2, problem)
        try:
            await _first(group)
        finally:
            with anyio.CancelScope(shield=True):
                await group.aclose()

    async with anyio.create_task_group() as tasks:
        for problem in range(4):
            tasks.start_soon(begin, problem)
    with anyio.move_on_after(0.0):
        await begin(0)
    await begin(1)
    await source.aclose()


async def _first(group: EnvironmentGroup | VectorEnvironment) -> object:
    """Begin all episodes, and return what they begin with in a form that can be compared."""
    if isinstance(group, VectorEnvironment):
        return np.asarray(await group.reset(np.zeros(group.size, np.int64))).tolist()
    return [(await environment.reset()).messages for environment in group.environments]


async def _episode(member: int, environment: Environment, answer: str) -> Episode:
    observation = await environment.reset()
    reward = 0.0
    for turn in range(MOST_TURNS):
        assert isinstance(observation, Observation), f"an observation is a {type(observation).__name__}"
        assert observation.messages or turn, "the first observation asks nothing"
        move = await environment.step(Action(answer, np.zeros(1, dtype=np.int64)))
        assert math.isfinite(move.reward), "a reward is not finite"
        reward += move.reward
        if move.terminated or move.truncated:
            return Episode(member, reward, (answer,) * (turn + 1), move.metrics)
        assert move.observation is not None, "a step that does not end the episode gave no observation"
        observation = move.observation
    raise AssertionError(f"the episode did not end within {MOST_TURNS} turns")


ENVIRONMENT: Sequence[Callable[[EnvironmentCase], Awaitable[None]]] = (
    problems_are_counted_and_have_a_fingerprint,
    a_problem_is_the_same_wherever_it_is_opened,
    there_is_no_problem_beyond_the_last,
    a_group_is_of_the_kind_that_its_space_says,
    episodes_end_and_their_rewards_are_finite,
    vector_steps_have_the_shapes_and_ends_that_are_promised,
    vector_episodes_are_numbered_and_can_be_repeated,
    held_out_problems_are_others_and_have_none_themselves,
    closing_twice_is_harmless,
    groups_are_opened_and_closed_concurrently,
)
