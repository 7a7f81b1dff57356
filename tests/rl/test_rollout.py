"""Rolling out a group: what becomes of answers, faults, time-outs and limits, and what a trajectory holds."""

import math

import anyio
import numpy as np
import pytest

from crucible_kitchen.errors import BackendError, CapabilityError, EnvironmentFault, SessionLost, TransientBackendError
from crucible_kitchen.ports.environment import Action, Observation, Transition, VectorTransition
from crucible_kitchen.rl.policy import PublishedPolicy
from crucible_kitchen.rl.rollout import FATAL, Roller, RolloutRules
from crucible_kitchen.rl.trajectories import EnvFault, InfraFault, Scored, Ticket, Timeout, Truncated
from crucible_kitchen.types import Acted, Message, Sampled

pytestmark = pytest.mark.anyio
END = 256


class Bytes:
    """A tokenizer of bytes with a chat template that is easy to read."""

    eos_id, vocab_size, prefix_ids, chat = END, 257, (), False

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode()

    def render_chat(self, messages, *, generation_prompt):
        found = []
        for message in messages:
            found += [*self.encode(f"<{message.role[0]}>{message.content}"), END, *self.encode("\n")]
        return found + (self.encode("<a>") if generation_prompt else [])


class Echo:
    """A sampler that answers with its seed's parity, a log-probability per token, and the end token."""

    tokenizer = Bytes()

    def __init__(self, answer=None, seconds=0.01):
        self.answer = answer or (lambda params: "1" if params.seed % 2 else "0")
        self.seconds = seconds
        self.closed = False
        self.requests = []

    async def sample(self, prompt, params, n=1):
        self.requests.append((bytes(t for t in prompt if t < 256).decode(), params))
        await anyio.sleep(self.seconds)
        text = self.answer(params)
        if isinstance(text, Exception):
            raise text
        cut = text.encode()[: params.max_tokens]
        ends = len(cut) < params.max_tokens
        tokens = np.array([*cut, END] if ends else list(cut))
        logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        return [Sampled(tokens, logprobs, cut.decode(), "stop" if ends else "length", raw_logprobs=logprobs - 1)]

    async def aclose(self):
        self.closed = True


class Scripted:
    """An environment that plays a script: per turn a transition, an exception, or seconds to sleep before."""

    def __init__(self, *script, prompt="q"):
        self.script, self.prompt, self.actions = list(script), prompt, []

    async def reset(self):
        if isinstance(self.prompt, Exception):
            raise self.prompt
        return Observation((Message("user", self.prompt),), stop=("!",))

    async def step(self, action):
        self.actions.append(action)
        move = self.script.pop(0) if self.script else Transition(0.0, False, observation=Observation(()))
        if isinstance(move, float):
            await anyio.sleep(move)
            move = self.script.pop(0) if self.script else Transition(0.0, True)
        if isinstance(move, Exception):
            raise move
        return move


class Source:
    """Opens what it is told, attempt by attempt; ``compare`` gives group rewards."""

    name, space = "scripted", None

    def __init__(self, *attempts, compare=None):
        self.attempts, self.compare, self.opened, self.closed = list(attempts), compare, [], 0

    async def open(self, problem, size, seed):
        self.opened.append((problem, size, seed))
        members = self.attempts.pop(0) if len(self.attempts) > 1 else self.attempts[0]
        members = members() if callable(members) else members
        if isinstance(members, Exception):
            raise members
        return Members(self, members) if isinstance(members, list) else members


class Members:
    def __init__(self, source, environments):
        self.source, self.environments = source, environments

    async def group_rewards(self, episodes):
        return self.source.compare(episodes) if self.source.compare else [0.0] * len(episodes)

    async def aclose(self):
        self.source.closed += 1


DONE = Transition(1.0, True, metrics={"correct": 1.0})


FIRST = Ticket(0, 0)


async def roll(source, *, sampler=None, ticket=FIRST, context=0, **rules):
    policy = PublishedPolicy(sampler or Echo(), 3)
    options = {"group_size": 2, "attempts": 1, "max_tokens": 8, **rules}
    roller = Roller(source, policy, RolloutRules(**options), tokenizer=Bytes(), context=context)
    return await roller(ticket)


# -- what goes well ---------------------------------------------------------------------------------------------------


async def test_a_trajectory_holds_every_token_with_where_it_came_from():
    turn = Transition(0.25, False, observation=Observation((Message("tool", "T"),)))
    group = await roll(Source(lambda: [Scripted(turn, Transition(1.0, True)) for _ in range(2)]))
    (first, _) = group.outcomes
    assert isinstance(first, Scored)
    t = first.trajectory
    said = "1" if t.targets[0] == ord("1") else "0"
    assert list(t.inputs["tokens"]) + list(t.after["tokens"]) == [ord("q"), ord(said), END, ord("T"), *t.targets[-2:]]
    assert list(t.mask) == [True, True, False, True, True]
    assert list(t.rewards) == [0, 0.25, 0, 0, 1.0]
    assert list(t.logprobs) == [-1, -2, 0, -1, -2]
    assert list(t.versions) == [3, 3, -1, 3, 3]
    assert (t.reward, t.actions, t.terminated) == (1.25, 4, True)


async def test_every_token_carries_the_version_that_sampled_it():
    policy = PublishedPolicy(Echo(), 0)

    class Publishing(Scripted):
        async def step(self, action):
            if not self.actions:
                await policy.publish(Echo(), 1)
            return await super().step(action)

    turn = Transition(0.0, False, observation=Observation((Message("tool", "T"),)))
    source = Source(lambda: [Publishing(turn, DONE)])
    roller = Roller(source, policy, RolloutRules(1, max_tokens=8), tokenizer=Bytes())
    group = await roller(Ticket(0, 0))
    assert list(group.versions()) == [0, 0, 1, 1]


async def test_turns_of_a_chat_are_added_as_the_template_would_render_them_without_tokenizing_again():
    turn = Transition(0.0, False, observation=Observation((Message("user", "more"),)))
    sampler = Echo(lambda params: "ok")
    await roll(Source(lambda: [Scripted(turn, DONE)]), sampler=sampler, chat=True, group_size=1)
    assert [prompt for prompt, _ in sampler.requests] == ["<u>q\n<a>", "<u>q\n<a>ok\n<u>more\n<a>"]


async def test_seeds_depend_on_the_run_the_draw_and_the_member_and_never_on_arrival():
    def seeds(sampler):
        return sorted(params.seed for _, params in sampler.requests)

    async def rolled(index, seed, seconds):
        sampler = Echo(seconds=seconds)
        await roll(
            Source(lambda: [Scripted(DONE), Scripted(DONE)]), sampler=sampler, ticket=Ticket(index, 0), seed=seed
        )
        return seeds(sampler)

    assert await rolled(5, 0, 0.01) == await rolled(5, 0, 3.0)
    assert len({*(await rolled(5, 0, 0.01)), *(await rolled(6, 0, 0.01)), *(await rolled(5, 1, 0.01))}) == 6


async def test_group_rewards_are_added_to_the_last_action_of_those_that_are_there():
    source = Source(
        lambda: [Scripted(Transition(1.0, True)), Scripted(EnvironmentFault("broken"))],
        compare=lambda episodes: [10.0 + episode.member + episode.reward for episode in episodes],
    )
    group = await roll(source)
    assert list(group.rewards) == [12.0]
    assert group.trajectories[0].rewards[-1] == 12.0
    assert group.kinds == {"scored": 1, "env_fault": 1}


async def test_sampling_from_a_processed_distribution_still_learns_about_the_model_s_own():
    sampler = Echo()
    group = await roll(Source(lambda: [Scripted(DONE)]), sampler=sampler, temperature=0.5, group_size=1)
    assert sampler.requests[0][1].raw_logprobs
    assert list(group.trajectories[0].logprobs) == [-2, -3]


async def test_stop_texts_of_the_environment_and_limits_reach_the_sampler():
    sampler, environment = Echo(lambda params: "a long answer"), Scripted(DONE)
    await roll(Source([environment]), sampler=sampler, group_size=1, max_tokens=4, mode="deterministic")
    params = sampler.requests[0][1]
    assert (params.stop, params.max_tokens, params.mode) == (("!",), 4, "deterministic")
    assert environment.actions[0].text == "a lo"
    assert not environment.actions[0].complete


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Stubborn(Scripted):
    async def step(self, action):
        await anyio.sleep_forever()


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (Scripted(ValueError("secret row")), EnvFault, "ValueError"),
        (Scripted(prompt=RuntimeError("secret row")), EnvFault, "RuntimeError"),
        (Scripted(EnvironmentFault("no such file")), EnvFault, "no such file"),
        (Scripted(Transition(math.nan, True)), EnvFault, "no finite number"),
        (Scripted(Transition("1", True)), EnvFault, "no finite number"),
        (Scripted(Transition(1.0, False)), EnvFault, "gave no observation"),
        (Scripted(TimeoutError("slow")), Timeout, "TimeoutError"),
        (Scripted(TransientBackendError("a server is down")), InfraFault, "a server is down"),
        (Stubborn(), Timeout, "did not end within 5 s"),
        (Scripted(100.0), Timeout, "did not end within 5 s"),
    ],
)
async def test_a_fault_is_never_a_reward(bad, kind, says):
    group = await roll(Source([Scripted(DONE), bad]), timeout=5.0)
    good, outcome = group.outcomes
    assert isinstance(good, Scored)
    assert isinstance(outcome, kind)
    assert says in outcome.reason
    assert "secret" not in outcome.reason
    assert list(group.rewards) == [1.0]


async def test_a_failed_sampler_is_a_fault_of_the_infrastructure():
    group = await roll(Source([Scripted(DONE)]), sampler=Echo(lambda params: BackendError("no answer")), group_size=1)
    assert group.kinds == {"infra_fault": 1}
    assert group.unusable == "infra_fault: no answer"


@pytest.mark.parametrize("error", [SessionLost("gone"), CapabilityError("cannot")])
async def test_what_no_rollout_would_be_spared_is_raised(error):
    assert isinstance(error, FATAL)
    with pytest.raises(type(error)):
        await roll(Source(lambda: [Scripted(DONE), Scripted(DONE)]), sampler=Echo(lambda params: error))


@pytest.mark.parametrize("logprobs", [None, np.zeros(1, np.float32), np.full(2, np.nan, np.float32)])
async def test_a_backend_that_reports_no_logprobs_is_refused(logprobs):
    class Silent(Echo):
        async def sample(self, prompt, params, n=1):
            return [Sampled(np.array([1, END]), logprobs, "x", "stop")]

    with pytest.raises(CapabilityError, match="log-probabilities"):
        await roll(Source(lambda: [Scripted(DONE)]), sampler=Silent(), group_size=1)


async def test_an_episode_that_never_ends_is_cut_and_keeps_its_reward():
    turn = Transition(0.5, False, observation=Observation((Message("tool", "x"),)))
    group = await roll(Source(lambda: [Scripted(*[turn] * 50)]), max_turns=3, group_size=1)
    (outcome,) = group.outcomes
    assert isinstance(outcome, Truncated)
    assert outcome.trajectory.reward == 1.5
    assert group.unusable is None


async def test_a_prompt_that_leaves_no_room_is_a_fault_and_a_later_one_a_cut():
    group = await roll(Source(lambda: [Scripted(DONE, prompt="x" * 20)]), context=20, group_size=1)
    assert "leaves no room" in (group.unusable or "")
    turn = Transition(1.0, False, observation=Observation((Message("tool", "y" * 30),)))
    group = await roll(Source(lambda: [Scripted(turn, DONE)]), context=30, group_size=1)
    assert group.kinds == {"truncated": 1}
    assert group.trajectories[0].actions == 2


async def test_members_that_failed_are_tried_again_in_a_group_opened_anew_with_the_same_seed():
    first = [Scripted(DONE), Scripted(RuntimeError())]
    second = [Scripted(), Scripted(Transition(0.5, True))]
    source = Source(first, second)
    group = await roll(source, attempts=2)
    assert list(group.rewards) == [1.0, 0.5]
    assert group.retries == 1
    assert source.opened[0] == source.opened[1]
    assert source.closed == 2
    assert not second[0].actions


async def test_a_group_needs_its_least_members_and_says_what_most_of_the_others_died_of():
    source = Source(lambda: [Scripted(DONE), Scripted(ValueError()), Scripted(ValueError()), Scripted(KeyError())])
    group = await roll(source, group_size=4, least=2)
    assert group.unusable == "env_fault: ValueError"
    assert (await roll(source, group_size=4, least=1)).unusable is None


async def test_a_comparison_that_fails_leaves_no_episode_with_half_a_reward():
    source = Source(lambda: [Scripted(DONE), Scripted(DONE)], compare=lambda episodes: [1.0])
    assert (await roll(source)).kinds == {"env_fault": 2}
    source = Source(lambda: [Scripted(DONE), Scripted(DONE)], compare=lambda episodes: [1.0, math.inf])
    assert (await roll(source)).kinds == {"env_fault": 2}


async def test_a_cancelled_rollout_closes_its_group():
    source = Source(lambda: [Stubborn(), Stubborn()])
    with anyio.move_on_after(2.0):
        await roll(source)
    assert source.closed == 1


# -- vector environments ----------------------------------------------------------------------------------------------


class Actor:
    """Acts by parity of the uniform numbers."""

    async def act(self, observations, uniforms=None):
        await anyio.sleep(0.01)
        size = len(observations)
        return Acted((uniforms > 0.5).astype(np.int64), np.full(size, -0.7, np.float32))

    async def aclose(self):
        pass


class Vector:
    """Member g ends after g + 1 steps; the last is cut, not over; rewards count steps."""

    def __init__(self, size=3, **faults):
        self.size, self.faults, self.at, self.closed = size, faults, 0, False

    async def reset(self, episodes):
        if "reset" in self.faults:
            raise self.faults["reset"]
        return np.zeros((self.size, 2), np.float32)

    async def step(self, actions):
        self.at += 1
        ends = np.arange(self.size) + 1 == self.at
        cut = ends & (np.arange(self.size) == self.size - 1)
        moved = {
            "rewards": np.full(self.size, float(self.at)),
            "terminated": ends & ~cut,
            "truncated": cut,
            "observations": np.full((self.size, 2), self.at, np.float32),
        }
        return VectorTransition(**(moved | self.faults))

    async def aclose(self):
        self.closed = True


async def roll_vector(vector, **rules):
    options = {"group_size": vector.size, "attempts": 1, **rules}
    return await Roller(Source(vector), PublishedPolicy(Actor(), 2), RolloutRules(**options))(Ticket(0, 0))


async def test_a_vector_environment_gives_one_trajectory_per_member_each_as_long_as_its_episode():
    group = await roll_vector(Vector())
    assert [outcome.kind for outcome in group.outcomes] == ["scored", "scored", "truncated"]
    assert [len(t) for t in group.trajectories] == [1, 2, 3]
    last = group.trajectories[2]
    assert list(last.rewards) == [1, 2, 3]
    assert last.inputs["observations"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert last.after["observations"].tolist() == [[3, 3]]
    assert list(last.versions) == [2, 2, 2]
    assert group.trajectories[0].after["observations"].tolist() == [[1, 1]]


async def test_a_vector_episode_that_is_too_long_is_cut():
    group = await roll_vector(Vector(4), max_turns=2)
    assert [outcome.kind for outcome in group.outcomes] == ["scored", "scored", "truncated", "truncated"]
    assert [len(t) for t in group.trajectories] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"reset": RuntimeError()}, "RuntimeError"),
        ({"rewards": np.array([0.0, np.nan, 0.0])}, "rewards are not finite"),
        ({"rewards": np.zeros((3, 1))}, "rewards have shape"),
        ({"observations": np.zeros((3, 5))}, "observations have shape"),
        ({"terminated": np.zeros(2, bool)}, "terminated have shape"),
    ],
)
async def test_a_vector_environment_that_breaks_its_contract_is_a_fault_of_all_members(faults, says):
    vector = Vector(**faults)
    group = await roll_vector(vector)
    assert group.kinds == {"env_fault": 3}
    assert says in (group.unusable or "")
    assert vector.closed


# -- the published policy ---------------------------------------------------------------------------------------------


async def test_a_replaced_sampler_is_closed_once_nobody_uses_it():
    one, two, three = Echo(), Echo(), Echo()
    policy = PublishedPolicy(one)
    with policy.current() as (sampler, version):
        assert (sampler, version) == (one, 0)
        await policy.publish(two, 1)
        assert not one.closed
        with policy.current() as (sampler, version):
            assert (sampler, version) == (two, 1)
    await policy.publish(three, 2)
    assert one.closed
    assert two.closed
    await policy.aclose()
    assert three.closed


def test_an_action_says_whether_the_policy_ended_it():
    assert Action("x", np.zeros(1, np.int64)).complete
