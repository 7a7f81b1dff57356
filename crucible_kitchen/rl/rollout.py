"""Rolling out one group: every member concurrently, with the current sampler; whatever happens becomes an outcome.

Knows environments and samplers, no queue and no learner. Read next: ``crucible_kitchen.rl.pipeline``.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import anyio
import numpy as np

from crucible_kitchen.errors import (
    BackendError,
    CapabilityError,
    CrucibleError,
    EnvironmentFault,
    OutOfMemory,
    SessionLost,
    StorageFull,
)
from crucible_kitchen.ports.environment import (
    Action,
    Environment,
    EnvironmentGroup,
    EnvironmentSource,
    Episode,
    VectorEnvironment,
)
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.rl.standing import Standing
from crucible_kitchen.rl.trajectories import (
    EnvFault,
    InfraFault,
    Outcome,
    Scored,
    Ticket,
    Timeout,
    TrajectoryGroup,
    Truncated,
)
from crucible_kitchen.rl.transcript import Transcript
from crucible_kitchen.rl.vector import Members, finite, roll_vector
from crucible_kitchen.types import Array, JsonObject, Sampled, SamplingParams
from crucible_kitchen.waits import waiting

__all__ = ["FATAL", "Roller", "RolloutRules", "derived_seed"]

FATAL = (CapabilityError, SessionLost, OutOfMemory, StorageFull)
"""What no other rollout would be spared: it ends the run, and is no outcome."""


@dataclass(frozen=True, slots=True)
class RolloutRules:
    """How a group is rolled out.

    Attributes:
        group_size: members.
        least: members without which a group is given up.
        max_tokens: of one turn.
        max_turns: after which an episode is cut.
        horizon: steps of a group in a vector environment that goes on; 0: whole episodes.
        temperature, top_p, top_k: see ``SamplingParams``.
        mode: see ``SamplingParams``.
        timeout: seconds that the rollout of a group may take.
        attempts: how often a member is rolled out before its fault counts.
        chat: whether prompts are wrapped in the chat template.
        seed: the run's.
        learned: whether what is sampled is learned from, which needs the model's own log-probabilities of it.
    """

    group_size: int
    least: int = 1
    max_tokens: int = 64
    max_turns: int = 1000
    horizon: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    mode: Literal["fast", "deterministic"] = "fast"
    timeout: float = 600.0
    attempts: int = 2
    chat: bool = False
    seed: int = 0
    learned: bool = True

    @property
    def processed(self) -> bool:
        """Whether what is learned from is drawn from another distribution than the model's own."""
        return self.learned and self._shaped

    @property
    def _shaped(self) -> bool:
        return self.temperature != 1.0 or self.top_p < 1.0 or self.top_k > 0


def derived_seed(*parts: object) -> int:
    """Return a seed of 62 bits that depends on all parts and nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class Published(Protocol):
    """See ``PublishedPolicy``."""

    def current(self) -> AbstractContextManager[tuple[Any, int]]:
        """Use the current sampler."""
        ...


class Roller:
    """Rolls out groups, any number at a time.

    Args:
        source: the problems.
        policy: gives the current sampler (of tokens, or a policy over observations).
        rules: how.
        tokenizer: the model's; None for a vector environment.
        context: the model's limit in tokens; 0 for none.
        standing: keeps the environment that goes on, with ``rules.horizon``.
        now: the loop's clock.
    """

    def __init__(
        self,
        source: EnvironmentSource,
        policy: Published,
        rules: RolloutRules,
        *,
        tokenizer: Tokenizer | None = None,
        context: int = 0,
        standing: Standing | None = None,
        now: Callable[[], float] = anyio.current_time,
    ) -> None:
        self._source = source
        self._policy = policy
        self._rules = rules
        self._tokenizer = tokenizer
        self._context = context or 2**31
        self._standing = standing
        self._now = now

    async def __call__(self, ticket: Ticket) -> TrajectoryGroup:
        """Roll out one problem; members that fail are tried again in an environment opened anew.

        Raises:
            CrucibleError: one of ``FATAL``.
            Exception: the group could not be opened or compared.
        """
        rollout = _Rollout(self, ticket)
        began, attempt = self._now(), 0
        while True:
            attempt += 1
            await rollout.attempt()
            if attempt >= self._rules.attempts or not rollout.worth_another:
                break
        outcomes = tuple(o if o is not None else Timeout("not begun") for o in rollout.outcomes)
        least = min(self._rules.least, len(outcomes))
        return TrajectoryGroup(
            ticket, outcomes, self._now() - began, rollout.spent, attempt - 1, least, rollout.carried
        )

    async def open(self, ticket: Ticket) -> EnvironmentGroup | VectorEnvironment:
        """Open a problem; everything random in it comes from (run seed, index)."""
        seed = derived_seed(self._rules.seed, "environment", ticket.index)
        return await self._source.open(ticket.problem, self._rules.group_size, seed)


class _Rollout:
    """One group on its way: the members' outcomes so far, and what they spent."""

    def __init__(self, roller: Roller, ticket: Ticket) -> None:
        self._r = roller
        self._rules = roller._rules
        self._ticket = ticket
        self._fatal: Exception | None = None
        self._texts: list[tuple[str, ...]] = [()] * self._rules.group_size
        self.outcomes: list[Outcome | None] = [None] * self._rules.group_size
        self.spent = {"sampling": 0.0, "environment": 0.0}
        self.carried: JsonObject | None = None

    @property
    def worth_another(self) -> bool:
        """Whether a member failed in a way that may pass."""
        return any(isinstance(o, (EnvFault, InfraFault)) for o in self.outcomes)

    async def attempt(self) -> None:
        """Open the group and roll out the members that have no trajectory."""
        rules = self._rules
        missing = [i for i, o in enumerate(self.outcomes) if not isinstance(o, (Scored, Truncated, Timeout))]
        with anyio.move_on_after(rules.timeout):
            await (self._segment() if rules.horizon else self._episodes(missing))
        if self._fatal is not None:
            raise self._fatal
        late = Timeout(f"the rollout did not end within {rules.timeout:g} s")
        for i in missing:
            if self.outcomes[i] is None:
                self.outcomes[i] = late

    async def _episodes(self, missing: Sequence[int]) -> None:
        group = await self._r.open(self._ticket)
        try:
            if isinstance(group, VectorEnvironment):
                await self._vector(group)
            else:
                await self._members(group, missing)
                if self._fatal is None:
                    await self._compare(group)
        finally:
            with anyio.CancelScope(shield=True):
                await group.aclose()

    async def _members(self, group: EnvironmentGroup, missing: Sequence[int]) -> None:
        for i in missing:
            self.outcomes[i] = None
        async with anyio.create_task_group() as tasks:
            for i in missing:
                tasks.start_soon(self._member, i, group.environments[i])

    async def _member(self, member: int, environment: Environment) -> None:
        try:
            self.outcomes[member] = await self._episode(member, environment)
        except FATAL as error:
            self._fatal = error
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes an outcome
            self.outcomes[member] = fault_of(error)

    async def _episode(self, member: int, environment: Environment) -> Outcome:
        rules, now = self._rules, self._r._now
        assert self._r._tokenizer is not None, "language environments need a tokenizer"
        transcript = Transcript(self._r._tokenizer, chat=rules.chat)
        texts: list[str] = []
        began = now()
        whom = f"the environment of rollout {self._ticket.index}/{member}"
        with waiting("call", whom):
            observation = await environment.reset()
        self.spent["environment"] += now() - began
        metrics: dict[str, float] = {}
        terminated = False
        for turn in range(rules.max_turns):
            transcript.tell(observation.messages)
            room = self._r._context - len(transcript)
            if room < 1:
                if not turn:
                    raise EnvironmentFault(f"a prompt of {len(transcript)} tokens leaves no room in the context")
                break
            began = now()
            sample, version = await self._sample(transcript.tokens, member, turn, room, observation.stop)
            sampled = now()
            texts.append(sample.text)
            with waiting("call", whom):
                transition = await environment.step(Action(sample.text, sample.tokens, sample.stop_reason == "stop"))
            self.spent["sampling"] += sampled - began
            self.spent["environment"] += now() - sampled
            transcript.said(sample.tokens, self._logprobs(sample), version)
            transcript.reward(finite(transition.reward))
            metrics = dict(transition.metrics)
            if transition.terminated or transition.truncated:
                terminated = transition.terminated
                break
            if transition.observation is None:
                raise EnvironmentFault("a step that does not end the episode gave no observation")
            observation = transition.observation
        self._texts[member] = tuple(texts)
        trajectory = transcript.trajectory(terminated=terminated, metrics=metrics)
        return Scored(trajectory) if terminated else Truncated(trajectory)

    async def _sample(
        self, tokens: list[int], member: int, turn: int, room: int, stop: tuple[str, ...]
    ) -> tuple[Sampled, int]:
        """Draw one turn; its randomness comes from (run seed, index, member, turn)."""
        rules = self._rules
        params = SamplingParams(
            max_tokens=min(rules.max_tokens, room),
            temperature=rules.temperature,
            top_p=rules.top_p,
            top_k=rules.top_k,
            stop=stop,
            seed=derived_seed(rules.seed, "sample", self._ticket.index, member, turn),
            mode=rules.mode,
            raw_logprobs=rules.processed,
        )
        with self._r._policy.current() as (sampler, version):
            (sample,) = await sampler.sample(tokens, params)
        return sample, version

    def _logprobs(self, sample: Sampled) -> Array:
        """Return the samples' log-probabilities under the model's own distribution, which is what is trained."""
        logprobs = sample.raw_logprobs if self._rules.processed else sample.logprobs
        if logprobs is None or len(logprobs) != len(sample.tokens) or not np.isfinite(logprobs).all():
            raise CapabilityError(
                "the backend gives no log-probabilities of what it sampled, without which nothing can be learned",
                hint="use a backend whose sampler reports logprobs",
            )
        return logprobs

    async def _compare(self, group: EnvironmentGroup) -> None:
        """Add the group's rewards to the members' last ones."""
        there = [(i, o) for i, o in enumerate(self.outcomes) if isinstance(o, (Scored, Truncated))]
        if not there:
            return
        episodes = [Episode(i, o.trajectory.reward, self._texts[i], o.trajectory.metrics) for i, o in there]
        began = self._r._now()
        try:
            found = [finite(float(reward)) for reward in await group.group_rewards(episodes)]
            if len(found) != len(there):
                raise EnvironmentFault(f"{len(found)} group rewards for {len(there)} episodes")
        except FATAL as error:
            self._fatal = error
        except Exception as error:  # noqa: BLE001 - whatever it is, no episode of the group has its reward
            for i, _ in there:
                self.outcomes[i] = fault_of(error)
        else:
            for (_, outcome), reward in zip(there, found, strict=True):
                outcome.trajectory.rewards[np.flatnonzero(outcome.trajectory.mask)[-1]] += reward
        self.spent["environment"] += self._r._now() - began

    async def _vector(self, group: VectorEnvironment) -> None:
        """Roll out one episode of each member."""
        with self._one_fault():
            self.outcomes[:] = await self._rolled(await Members.begin(group))

    async def _segment(self) -> None:
        """Let the environment go on from where the last group stopped."""
        assert self._r._standing is not None, "an environment that goes on is kept somewhere"
        with self._one_fault():
            async with self._r._standing.at(self._ticket, self._r.open) as place:
                self.outcomes[:] = await self._rolled(place.members)
            self.carried = place.stopped

    @contextmanager
    def _one_fault(self) -> Iterator[None]:
        """Make what goes wrong the fault of all members: they share one environment."""
        try:
            yield
        except FATAL as error:
            self._fatal = error
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes an outcome
            self.outcomes[:] = [fault_of(error)] * len(self.outcomes)

    async def _rolled(self, members: Members) -> list[Outcome]:
        rules = self._rules
        rng = np.random.Generator(np.random.Philox(key=derived_seed(rules.seed, "act", self._ticket.index)))
        how: dict[str, Any] = {"horizon": rules.horizon, "max_steps": rules.max_turns}
        return await roll_vector(members, self._r._policy, rng, spent=self.spent, now=self._r._now, **how)


def fault_of(error: Exception) -> Outcome:
    """Return the outcome that an error is; texts of foreign errors stay out, because they may quote data."""
    says = error.message if isinstance(error, CrucibleError) else type(error).__name__
    if isinstance(error, TimeoutError):
        return Timeout(says)
    return InfraFault(says) if isinstance(error, BackendError) else EnvFault(says)
