"""Sampling sessions: which weights each samples from, opened when first asked and few at a time.

Calls run beside each other, so that the executor can merge them. Knows the training port, no HTTP. Read next:
``crucible_kitchen.ports.sampling_client``.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.abc
import numpy as np

from crucible_kitchen.errors import BackendUserError, CapacityError, NotFoundError, SessionLost
from crucible_kitchen.ports import Sampler
from crucible_kitchen.service.departures import Departure
from crucible_kitchen.service.futures import Future, Futures
from crucible_kitchen.service.models import Limits, SessionOpener, TrainedModel
from crucible_kitchen.types import JsonObject, Sampled, SamplingParams, SessionSpec, StateRef
from crucible_kitchen.wire import messages as m
from crucible_kitchen.wire.codec import dumps, parse, token_ids
from crucible_kitchen.workers import run_sync

__all__ = ["OpenedModel", "SamplingSession", "draw", "draw_of_batch", "not_found", "reply"]

_MOST = 1 << 25
"""Bytes of answers in one reply, unless one alone has more."""

_FEW = 4096
"""Tokens that are written as JSON at once; more are written in a worker thread."""


@dataclass
class OpenedModel:
    """A model opened for sampling only: a base model, or one with saved weights."""

    open_session: SessionOpener
    spec: SessionSpec
    state: StateRef | None = None
    users: int = 0
    sampler: Sampler | None = None
    failure: Exception | None = None
    ready: anyio.Event = field(default_factory=anyio.Event)
    closing: anyio.Event = field(default_factory=anyio.Event)

    async def run(self) -> None:
        """Hold the model open until it is closed."""
        try:
            async with self.open_session(self.spec) as session:
                if self.state is not None:
                    await session.load_state(self.state)
                self.sampler = await session.sampler()
                self.ready.set()
                await self.closing.wait()
        except Exception as error:  # noqa: BLE001 - told to whoever samples
            self.failure = error
        finally:
            self.sampler = None
            self.ready.set()


@dataclass
class SamplingSession:
    """Where the samples of one sampling session come from.

    Attributes:
        id: the wire's name for it.
        base_model: the model that the tokenizer belongs to.
        model_path: of saved weights.
        model: in training, whose sampler ``id`` it keeps.
        opened: the model opened for it.
        numbered: the requests, by number.
        drawing: how many of them have no answer yet.
        answers: those of batches that have ended and were not yet received.
        answered: set when there is another.
        departure: when those leave that were not yet told.
    """

    id: str
    base_model: str
    model_path: str | None = None
    model: TrainedModel | None = None
    opened: OpenedModel | None = None
    numbered: "OrderedDict[int, Future]" = field(default_factory=OrderedDict)
    drawing: int = 0
    answers: dict[int, Future] = field(default_factory=dict)
    answered: anyio.Event = field(default_factory=anyio.Event)
    departure: Departure = field(default_factory=Departure)

    async def sampler(self) -> Sampler:
        """Return the sampler, once it is open.

        Raises:
            SessionLost: its weights were not saved and are gone.
        """
        if self.model is not None:
            found = self.model.samplers.get(self.id)
            if found is None:
                raise SessionLost("the sampler's weights are gone", hint="get a new sampler")
            return found
        assert self.opened is not None
        await self.opened.ready.wait()
        if self.opened.failure is not None:
            raise self.opened.failure
        if self.opened.sampler is None:
            raise SessionLost("the sampler was closed to make room for others", hint="open it again")
        return self.opened.sampler

    def submit(self, number: int | None, futures: Futures, limits: Limits) -> tuple[Future, bool]:
        """Return the future of a number, and whether it is new.

        Raises:
            CapacityError: too many are drawn, or were drawn and not received.
        """
        if number is not None and number in self.numbered:
            return self.numbered[number], False
        if self.drawing + len(self.answers) >= 16 * limits.open_calls:
            raise CapacityError("too many samples are drawn at once", hint="wait for some")
        self.drawing += 1
        future = futures.create()
        self.numbered[-futures.created if number is None else number] = future
        while len(self.numbered) > 32 * limits.open_calls:
            futures.release(self.numbered.popitem(last=False)[1])
        return future, True

    def submit_all(
        self, numbers: Iterable[int], futures: Futures, limits: Limits
    ) -> tuple[dict[int, Future], list[int]]:
        """Return the futures of the numbers that are new, and the numbers that there is no room for."""
        taken, left = {}, []
        for number in numbers:
            try:
                future, new = self.submit(number, futures, limits)
            except CapacityError:
                left.append(number)
                continue
            if new:
                taken[number] = future
        return taken, left

    def answer(self, number: int, future: Future, took: float) -> None:
        """Give an answer to whoever waits for some; ``took`` seconds were needed to draw it."""
        self.departure.add(anyio.current_time(), took, self.drawing)
        self.answers[number] = future
        self.answered.set()

    def receive(self, numbers: Sequence[int], futures: Futures) -> None:
        """Let go of answers that have arrived."""
        for number in numbers:
            future = self.answers.pop(number, None)
            if future is not None:
                futures.release(future)

    def end(self, error: SessionLost) -> None:
        """Answer everything that is drawn with an error, and whoever waits at once."""
        for number, future in self.numbered.items():
            if not future.done:
                future.fail(error)
                self.answers[number] = future
        self.departure.add(anyio.current_time(), 0.0, 0)
        self.answered.set()

    async def gathered(self, seconds: float) -> list[tuple[int, Future]]:
        """Return the answers that are there by number, once there is one; none if there is none in time.

        Those that were not yet told wait for others as :class:`Departure` says.
        """
        departure: Departure | None = None
        with anyio.move_on_after(seconds):
            if not self.answers:
                self.answered = anyio.Event() if self.answered.is_set() else self.answered
                await self.answered.wait()
            departure = self.departure
            await departure.wait()
        if self.departure is departure:
            self.departure = Departure()
        told, size = [], 0
        for number, future in self.answers.items():
            told.append((number, future))
            size += len(future.body)
            if size > _MOST:
                break
        return told


def reply(answers: Sequence[tuple[int, Future]], left: Sequence[int]) -> bytes:
    """Return what a batch is replied as JSON: answers by number, and the numbers that there was no room for."""
    results = b",".join(b'"%d":%s' % (number, future.body) for number, future in answers)
    return dumps({"left": left})[:-1] + b',"results":{' + results + b"}}"


async def draw_of_batch(session: SamplingSession, number: int, future: Future, body: JsonObject) -> None:
    """Answer one request of a batch."""
    began = anyio.current_time()
    await draw(session, future, body)
    session.answer(number, future, anyio.current_time() - began)


async def draw(session: SamplingSession, future: Future, body: JsonObject) -> None:
    """Answer one request; cancelling its future's scope frees its slot."""
    with anyio.CancelScope() as scope:
        future.scope = scope
        try:
            future.resolve(await _drawn(session, body))
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            future.fail(error)
    session.drawing -= 1
    if scope.cancelled_caught:
        future.fail(SessionLost("the request was cancelled"))


async def _drawn(session: SamplingSession, body: JsonObject) -> bytes:
    message = parse(m.Sample, body)
    extension = message.crucible or m.SampleExtension()
    sampler = await session.sampler()
    if extension.score is not None:
        scores = await sampler.compute_logprobs(extension.score)
        listed = [np.asarray(s).tolist() for s in scores]
        return dumps({"type": "sample", "sequences": [], "crucible": {"scores": listed}})
    samples = await sampler.sample(token_ids(message.prompt), _params(message, extension), message.num_samples)
    if sum(len(s.tokens) for s in samples) < _FEW:
        return _answer(samples, sampler.version, message)
    return await run_sync(_answer, samples, sampler.version, message)


def _params(message: m.Sample, extension: m.SampleExtension) -> SamplingParams:
    given = message.sampling_params
    stop = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    if any(not isinstance(each, str) for each in stop):
        raise BackendUserError("stop takes texts here, not token ids")
    if message.topk_prompt_logprobs:
        raise BackendUserError("topk_prompt_logprobs is not known here", hint="ask for 0")
    return SamplingParams(
        max_tokens=given.max_tokens if given.max_tokens is not None else 1 << 20,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=max(given.top_k, 0),
        stop=tuple(str(each) for each in stop),
        seed=given.seed,
        mode=extension.mode,
        raw_logprobs=extension.raw_logprobs,
        top_logprobs=extension.top_logprobs,
        prompt_logprobs=bool(message.prompt_logprobs),
        rescore=extension.rescore,
    )


def _answer(samples: list[Sampled], version: int, message: m.Sample) -> bytes:
    answer: JsonObject = {
        "type": "sample",
        "sequences": [_sequence(s, extended=message.crucible is not None) for s in samples],
    }
    if message.prompt_logprobs and samples and samples[0].prompt_logprobs is not None:
        answer["prompt_logprobs"] = [None, *np.asarray(samples[0].prompt_logprobs).tolist()]
    if message.crucible is not None:
        answer["crucible"] = {"step": version}
    return dumps(answer)


def _sequence(sample: Sampled, *, extended: bool) -> JsonObject:
    told: JsonObject = {
        "stop_reason": sample.stop_reason,
        "tokens": sample.tokens.tolist(),
        "logprobs": np.asarray(sample.logprobs).tolist(),
    }
    if extended:
        more = {n: getattr(sample, n) for n in ("raw_logprobs", "top_tokens", "top_logprobs")}
        told["crucible"] = {
            "text": sample.text,
            **{n: np.asarray(v).tolist() for n, v in more.items() if v is not None},
        }
    return told


def not_found(session_id: str) -> NotFoundError:
    """Return the error of an unknown sampling session."""
    return NotFoundError(f"there is no sampling session {session_id[:64]!r}")
