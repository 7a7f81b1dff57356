"""The contract of training sessions over time: pending calls, states, samplers, exports, lifetimes.

Adds to the suite of ``training_client``. Knows no adapter. Read next: ``crucible_kitchen.ports.training_client``.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import wraps

import anyio

from crucible_kitchen.errors import CrucibleError, IntegrityError, NonFiniteLoss
from crucible_kitchen.testing.contracts.base import refuses, same_bits, skip
from crucible_kitchen.testing.contracts.sampler import SAMPLER_CHECKS, Sampling
from crucible_kitchen.testing.contracts.training_case import (
    TRAINING_CLIENT,
    TrainingClientCase,
    batch,
    datum,
    look,
    saved,
    train,
)
from crucible_kitchen.types import LoraSpec, SamplingParams

__all__: list[str] = []

_GUARD = 60.0
"""Seconds after which a check gives up on a call that hangs."""


@TRAINING_CLIENT
async def equal_seeds_give_equal_sessions(case: TrainingClientCase) -> None:
    """To the last bit where reproducible; two sessions at once do not disturb each other."""
    async with case.session() as one, case.session() as other:
        for session in (one, other, one, other):
            await train(session, [batch(session)], case.optimizer())
        case.equal(await look(one), await look(other), "two sessions of one seed")


@TRAINING_CLIENT
async def a_fresh_adapter_changes_nothing(case: TrainingClientCase) -> None:
    """LoRA begins as the base model."""
    capabilities = case.client.capabilities
    if not (capabilities.lora and capabilities.full_weights):
        skip("it trains either LoRA or all weights")
    seen = []
    for lora in (None, LoraSpec(4)):
        async with replace(case, lora=lora).session() as session:
            seen.append(await look(session))
    case.near(seen[0], seen[1], "the base model and a fresh adapter on it")


@TRAINING_CLIENT
async def a_pending_result_can_be_awaited_again(case: TrainingClientCase) -> None:
    """Any number of times, later, in any order."""
    async with case.session() as session:
        first, second = await session.forward(batch(session)), await session.forward([datum(session, 7)])
        later = (await second).logprobs
        again = [(await first).logprobs, (await first).logprobs]
        same_bits(again[0], again[1], "awaited twice")
        same_bits(later, (await second).logprobs, "awaited in another order")


@TRAINING_CLIENT
async def an_unobserved_failure_fails_the_next_call(case: TrainingClientCase) -> None:
    """Nothing fails silently; after that the session goes on."""
    async with case.session() as session:
        with refuses(NonFiniteLoss, what="calling on after a failure that nobody awaited"):
            async with session.step(0) as step:
                await step.forward_backward([datum(session, 1, weight=float("nan"))])
                await step.apply(case.optimizer())
            for _ in range(2):  # the first shows that the failure is there
                await (await session.forward([datum(session, 1)]))
        await train(session, [batch(session)], case.optimizer())
        assert session.position == 1, "the session is not usable after a failure"


@TRAINING_CLIENT
async def a_cancelled_wait_leaves_the_call_running(case: TrainingClientCase) -> None:
    """Its result can still be awaited and the session stays usable."""
    async with case.session() as session:
        expected = await look(session)
        with anyio.CancelScope() as scope:
            pending = await session.forward([datum(session, number) for number in range(6)])
            scope.cancel()
            await pending
        assert scope.cancelled_caught, "waiting could not be cancelled"
        case.equal(expected, list((await pending).logprobs), "a call whose waiting was cancelled")
        await train(session, [batch(session)], case.optimizer())


@TRAINING_CLIENT
async def a_cancelled_step_leaves_the_session_usable(case: TrainingClientCase) -> None:
    """It is opened again and gives what it would have given."""
    async with case.session() as session:
        await train(session, [batch(session)], case.optimizer())
        expected = await look(session)
    async with case.session() as session:
        with anyio.CancelScope() as scope:
            async with session.step(0) as step:
                await step.forward_backward(batch(session))
                scope.cancel()
                await anyio.sleep_forever()
        assert session.position == 0, "a cancelled step was counted"
        await train(session, [batch(session)], case.optimizer())
        case.equal(expected, await look(session), "a step that was cancelled once")


@TRAINING_CLIENT
async def leaving_the_block_ends_all_calls(case: TrainingClientCase) -> None:
    """What is open then has a result or an error, at once; later calls are refused."""
    async with case.session() as session:
        datums = batch(session) * 4
        pendings = [await session.forward(datums) for _ in range(4)]
    with anyio.fail_after(_GUARD):
        for pending in pendings:
            try:
                await pending
            except CrucibleError:
                continue
    with refuses(CrucibleError, what="calling a closed session"):
        await (await session.forward(datums))


@TRAINING_CLIENT
async def an_error_in_the_block_leaves_it_as_it_is(case: TrainingClientCase) -> None:
    """Neither wrapped nor swallowed, whatever is open."""
    with refuses(ZeroDivisionError, what="a block that fails"):
        async with case.session() as session:
            await session.forward(batch(session))
            raise ZeroDivisionError


@TRAINING_CLIENT
async def a_state_restores_the_session_bit_for_bit(case: TrainingClientCase) -> None:
    """Weights, optimizer and step: what follows would have followed, here and in another session of the same spec."""
    async with case.session() as session:
        for _ in range(2):
            await train(session, [batch(session)], case.optimizer())
        state = await saved(session, "two")
        before = await look(session)
        await train(session, [batch(session, 3)], case.optimizer())
        future = await look(session)
        assert state.step == 2, f"state of step {state.step}, position {session.position}"
        assert session.position == 3, f"state of step {state.step}, position {session.position}"
        await session.load_state(state)
        assert session.position == 2, f"position {session.position} after loading step 2"
        case.equal(before, await look(session), "weights after loading")
        await train(session, [batch(session, 3)], case.optimizer())
        case.equal(future, await look(session), "the step after loading")
    async with case.session() as other:
        await other.load_state(state)
        case.equal(before, await look(other), "weights loaded elsewhere")
        await train(other, [batch(other, 3)], case.optimizer())
        case.equal(future, await look(other), "the step after loading elsewhere")


@TRAINING_CLIENT
async def weights_without_the_optimizer_begin_a_new_training(case: TrainingClientCase) -> None:
    """The weights are the state's to the last bit; the next step is the first of a fresh optimizer."""
    spread = {"beta1": 0.9, "beta2": 0.99}  # moments that are kept would be seen
    async with case.session() as session:
        for _ in range(2):
            await train(session, [batch(session)], case.optimizer(**spread))
        state = await saved(session, "two")
        before = await look(session)
        await train(session, [batch(session, 3)], case.optimizer(**spread))
        kept = await look(session)
        await session.load_weights(state)
        assert session.position == 0, f"position {session.position} after loading weights alone"
        case.equal(before, await look(session), "weights loaded alone")
        await train(session, [batch(session, 3)], case.optimizer(**spread))
        anew = await look(session)
        assert session.position == 1, f"position {session.position} after the first step"
        case.moved(kept, anew)
    async with case.session() as other:
        await other.load_weights(state)
        await train(other, [batch(other, 3)], case.optimizer(**spread))
        case.equal(anew, await look(other), "the first step after loading weights elsewhere")


@TRAINING_CLIENT
async def a_state_restores_the_generator(case: TrainingClientCase) -> None:
    """Samples without a seed go on as they would have."""
    if not (case.client.capabilities.sampling and case.client.capabilities.reproducible):
        skip("it does not sample, or not reproducibly")
    params = SamplingParams(max_tokens=12, temperature=1.0)
    async with case.session() as session:
        state = await saved(session, "zero")
        drawn = []
        for _ in range(2):
            await session.load_state(state)
            sampler = await session.sampler()
            prompt = [*sampler.tokenizer.prefix_ids, *sampler.tokenizer.encode("1+")]
            drawn.append([s.tokens.tolist() for s in await sampler.sample(prompt, params, 3)])
        assert drawn[0] == drawn[1], "samples after loading are others"


@TRAINING_CLIENT
async def saving_waits_for_what_was_submitted(case: TrainingClientCase) -> None:
    """A state holds the steps called for before it, awaited or not, and none of later ones; a name's newest wins."""
    async with case.session() as session:
        await saved(session, "latest")
        async with session.step(0) as step:
            await step.forward_backward(batch(session))
            applied = await step.apply(case.optimizer())
            pending = await session.save_state("latest")
            await applied
        await train(session, [batch(session)], case.optimizer())
        state = await pending
        await session.load_state(state)
        expected = await look(session)
        await train(session, [batch(session)], case.optimizer())
        await session.load_state(state)
        assert (state.step, session.position) == (1, 1), f"step {state.step}, position {session.position}"
        case.equal(expected, await look(session), "the newest state of a name")


@TRAINING_CLIENT
async def a_deleted_state_cannot_be_loaded(case: TrainingClientCase) -> None:
    """Deleting twice is no error, and leaves the others."""
    async with case.session() as session:
        state, other = await saved(session, "gone"), await saved(session, "kept")
        await session.delete_state(state)
        await session.delete_state(state)
        with refuses(CrucibleError, what="loading a deleted state"):
            await session.load_state(state)
        await session.load_state(other)


@TRAINING_CLIENT
async def a_damaged_state_is_refused(case: TrainingClientCase) -> None:
    """And changes nothing."""
    if case.tamper is None:
        skip("stored states cannot be changed from outside")
    async with case.session() as session:
        state = await saved(session, "damaged")
        await train(session, [batch(session)], case.optimizer())
        before = await look(session)
        case.tamper(state)
        with refuses(IntegrityError, what="loading a damaged state"):
            await session.load_state(state)
        assert session.position == 1, f"position {session.position}"
        case.equal(before, await look(session), "weights after refusing a state")


@TRAINING_CLIENT
async def a_sampler_keeps_its_weights(case: TrainingClientCase) -> None:
    """Later steps do not change it; a new sampler has the new ones and says so."""
    if not case.client.capabilities.sampling:
        skip("it does not sample")
    async with case.session() as session:
        sequences = [[*d.inputs["tokens"].tolist(), int(d.loss_inputs["target_tokens"][-1])] for d in batch(session)]
        old = await session.sampler()
        before = await old.compute_logprobs(sequences)
        await train(session, [batch(session)], case.optimizer())
        same_bits(before, await old.compute_logprobs(sequences), "a sampler after a step")
        new = await session.sampler()
        assert (old.version, new.version) == (0, 1), f"versions {old.version} and {new.version}"
        case.moved(before, await new.compute_logprobs(sequences))


@TRAINING_CLIENT
async def a_sampler_computes_what_the_session_computes(case: TrainingClientCase) -> None:
    """The same log-probabilities."""
    if not case.client.capabilities.sampling:
        skip("it does not sample")
    async with case.session() as session:
        datums = batch(session)
        sequences = [[*d.inputs["tokens"].tolist(), int(d.loss_inputs["target_tokens"][-1])] for d in datums]
        computed = await (await session.sampler()).compute_logprobs(sequences)
        forward = await (await session.forward(datums))
        tolerance = max(case.tolerance, 1e-5)
        replace(case, tolerance=tolerance).near(computed, forward.logprobs, "sampler and session")


@TRAINING_CLIENT
async def an_export_lists_the_files_it_wrote(case: TrainingClientCase) -> None:
    """Into the directory that was given, all of them there, none empty-handed."""
    if not case.client.capabilities.export:
        skip("it does not export")
    directory = anyio.Path(case.directory / "export")
    await directory.mkdir()
    async with case.session() as session:
        await train(session, [batch(session)], case.optimizer())
        exported = await session.export(str(directory))
    written = {p.relative_to(directory).as_posix() async for p in directory.rglob("*") if await p.is_file()}
    assert written == set(exported.files), f"listed {exported.files}, wrote {sorted(written)}"
    assert written, f"listed {exported.files}, wrote {sorted(written)}"
    assert exported.directory == str(directory), f"exported {exported}"
    assert exported.format, f"exported {exported}"


def _on_its_sampler(check: Callable[[Sampling], Awaitable[None]]) -> Callable[[TrainingClientCase], Awaitable[None]]:
    @wraps(check)
    async def on_its_sampler(case: TrainingClientCase) -> None:
        if not case.client.capabilities.sampling:
            skip("it does not sample")
        async with case.session() as session:
            sampler = await session.sampler()
            await check(Sampling(sampler, max(case.tolerance, 1e-3), session.info.context_length))

    return on_its_sampler


for _check in SAMPLER_CHECKS:
    TRAINING_CLIENT(_on_its_sampler(_check))
