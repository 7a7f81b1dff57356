"""The contract of port ``training_client``: gradients are sums, steps are counted, scales are kept.

States, samplers and lifetimes are in ``training_session``, what a model says beyond log-probabilities is in
``training_outputs``; importing this module gives the whole suite.
Knows no adapter. Read next: ``crucible_kitchen.testing.contracts.training_session``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError, ModelNotFound, NonFiniteLoss
from crucible_kitchen.ports import TrainingSession
from crucible_kitchen.testing.contracts import training_outputs, training_session
from crucible_kitchen.testing.contracts.base import refuses, same_bits, skip
from crucible_kitchen.testing.contracts.training_case import (
    TRAINING_CLIENT,
    StatedCrossEntropy,
    TrainingClientCase,
    batch,
    datum,
    look,
    train,
)
from crucible_kitchen.types import Array, Datum, Float64Array, Loss, LossValue, SessionSpec

__all__ = ["TRAINING_CLIENT", "TrainingClientCase", "training_outputs", "training_session"]


@TRAINING_CLIENT
async def a_session_states_its_facts(case: TrainingClientCase) -> None:
    """Sizes are positive, position is 0, and the session can do no more than its client."""
    async with case.session() as session:
        info = session.info
        assert 0 < info.trainable_parameters <= info.parameters, f"parameters {info}"
        assert info.context_length > 0, f"sizes {info}"
        assert info.vocab_size > 0, f"sizes {info}"
        assert info.hidden_size > 0, f"sizes {info}"
        assert info.lora_rank == (case.lora.rank if case.lora else 0), f"LoRA rank {info.lora_rank}"
        assert session.position == 0, f"a new session is at step {session.position}"
        assert session.capabilities.losses <= case.client.capabilities.losses, "a session has more losses"
        assert session.capabilities.synthetic == case.client.synthetic, "synthetic here, not there"


@TRAINING_CLIENT
async def a_model_that_does_not_exist_is_not_found(case: TrainingClientCase) -> None:
    """On entering."""
    if not case.unknown_model:
        skip("it takes every name")
    spec = SessionSpec(case.unknown_model, case.lora, 0, str(case.directory))
    with refuses(ModelNotFound, what="opening a model that does not exist"):
        async with case.client.open_session(spec):
            pass


@TRAINING_CLIENT
async def the_loss_is_a_sum(case: TrainingClientCase) -> None:
    """Of weighted negative log-probabilities, over all datums; never a mean."""
    async with case.session() as session:
        datums = batch(session, weight=0.5)
        async with session.step(0) as step:
            result = await (await step.forward_backward(datums))
        weights = [d.loss_inputs["weights"] for d in datums]
        terms = [np.sum(w[w != 0] * lp[w != 0]) for w, lp in zip(weights, result.logprobs, strict=True)]
        assert [lp.shape for lp in result.logprobs] == [(len(d),) for d in datums], "log-probabilities' shapes"
        assert abs(result.loss + sum(terms)) <= case.tolerance * 100, f"loss {result.loss}, sum {-sum(terms)}"
        weight = float(sum(np.sum(d.loss_inputs["weights"]) for d in datums))
        assert abs(result.weight - weight) < 1e-6, f"weight {result.weight}, sum {weight}"
        assert result.tokens == sum(len(d) for d in datums), f"tokens {result.tokens} count padding"


@TRAINING_CLIENT
async def forward_gives_what_forward_backward_gives(case: TrainingClientCase) -> None:
    """The same log-probabilities, alone or in company.

    Where a weight is 0 ``forward_backward`` may leave them out (NaN, never a wrong number).
    """
    async with case.session() as session:
        datums = batch(session)
        alone = [(await (await session.forward([d]))).logprobs[0] for d in datums]
        together = (await (await session.forward(datums))).logprobs
        async with session.step(0) as step:
            trained = (await (await step.forward_backward(datums))).logprobs
        case.near(alone, together, "alone and in company")
        trains = [d.loss_inputs["weights"] != 0 for d in datums]
        weighted = [[lp[t] for lp, t in zip(lps, trains, strict=True)] for lps in (together, trained)]
        case.near(weighted[0], weighted[1], "forward and forward_backward")


@TRAINING_CLIENT
async def training_lowers_the_loss(case: TrainingClientCase) -> None:
    """Steps go downhill and are counted."""
    async with case.session() as session:
        before = await look(session)
        losses = []
        for number in range(4):
            async with session.step(number) as step:
                result = await step.forward_backward(batch(session))
                optim = await (await step.apply(case.optimizer(learning_rate=case.learning_rate / 10)))
                losses.append((await result).loss)
            assert optim.step == session.position == number + 1, f"step {optim.step} at {session.position}"
        case.moved(before, await look(session))
        assert losses == sorted(losses, reverse=True), f"losses {losses}"


@TRAINING_CLIENT
async def splitting_a_batch_into_calls_changes_nothing(case: TrainingClientCase) -> None:
    """One call, one call per datum, or two uneven ones give the same update up to rounding."""
    updates = []
    for cuts in ((0, 4), (0, 1, 2, 3, 4), (0, 3, 4)):
        async with case.session() as session:
            before, datums = await look(session), batch(session)
            calls = [datums[a:b] for a, b in pairwise(cuts)]
            await train(session, calls, case.optimizer())
            updates.append(await look(session))
            case.moved(before, updates[-1])
    for update in updates[1:]:
        case.near(updates[0], update, "the update of a split batch")


@TRAINING_CLIENT
async def scaling_the_step_equals_scaling_the_weights(case: TrainingClientCase) -> None:
    """``scale=1/N`` is what weights divided by N give; the gradient's norm is that of the scaled gradient."""
    if case.client.capabilities.step_scale == "none":
        skip("it does not scale")
    async with case.session() as session:
        one = await train(session, [batch(session)], case.optimizer(), scale=0.125)
        by_step = await look(session)
    async with case.session() as session:
        other = await train(session, [batch(session, weight=0.125)], case.optimizer())
        case.near(by_step, await look(session), "scale=1/8 and weights of 1/8")
    async with case.session() as session:
        whole = await train(session, [batch(session)], case.optimizer())
    assert abs(one.grad_norm - other.grad_norm) <= 1e-4 * one.grad_norm, f"norms {one.grad_norm}, {other.grad_norm}"
    assert abs(whole.grad_norm / one.grad_norm - 8) < 1e-3, f"norms {whole.grad_norm} and {one.grad_norm} are not 8:1"


@TRAINING_CLIENT
async def a_backend_keeps_the_scale_it_states(case: TrainingClientCase) -> None:
    """What it cannot keep it refuses: a changing scale if ``constant``, any if ``none``."""
    kept = case.client.capabilities.step_scale
    if kept == "exact":
        skip("it keeps every scale")
    async with case.session() as session:
        scales = (0.5, 0.25) if kept == "constant" else (0.5,)
        with refuses(CapabilityError, what=f"the scales {scales} where the scale is {kept}"):
            for scale in scales:
                await train(session, [batch(session)], case.optimizer(), scale=scale)


@TRAINING_CLIENT
async def clipping_limits_the_scaled_gradient(case: TrainingClientCase) -> None:
    """A gradient clipped to half its norm gives the update of half the gradient; the norm reported is unclipped."""
    async with case.session() as session:
        norm = (await train(session, [batch(session)], case.optimizer())).grad_norm
    async with case.session() as session:
        clipped = await train(session, [batch(session)], case.optimizer(grad_clip_norm=norm / 2))
        update = await look(session)
    async with case.session() as session:
        await train(session, [batch(session, weight=0.5)], case.optimizer())
        case.near(update, await look(session), "clipped to half and halved")
    assert abs(clipped.grad_norm - norm) <= 1e-5 * norm, f"the norm reported is {clipped.grad_norm}, not {norm}"


@TRAINING_CLIENT
async def order_decides_the_sum_whatever_the_arrival(case: TrainingClientCase) -> None:
    """The same bits for every order of arrival."""
    if not case.client.capabilities.ordered_accumulation:
        skip("it adds in the order of arrival")
    updates = []
    for arrival in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        async with case.session() as session:
            datums = batch(session)
            async with session.step(0) as step:
                for number in arrival:
                    await (await step.forward_backward([datums[number]], order=number))
                await (await step.apply(case.optimizer()))
            updates.append(await look(session))
    for update in updates[1:]:
        same_bits(updates[0], update, "another order of arrival")


@TRAINING_CLIENT
async def an_abandoned_accumulation_is_dropped(case: TrainingClientCase) -> None:
    """A step that is opened again begins with nothing, whether its block was left quietly or by an error."""
    async with case.session() as session:
        await train(session, [batch(session)], case.optimizer())
        expected = await look(session)
    async with case.session() as session:
        async with session.step(0) as step:
            await step.forward_backward([datum(session, 9)])
        with refuses(ZeroDivisionError, what="a block that fails"):
            async with session.step(0) as step:
                await (await step.forward_backward([datum(session, 8)]))
                raise ZeroDivisionError
        assert session.position == 0, "an abandoned step was counted"
        await train(session, [batch(session)], case.optimizer())
        case.equal(expected, await look(session), "a step that was tried before")


@TRAINING_CLIENT
async def a_wrong_step_is_refused(case: TrainingClientCase) -> None:
    """Neither one that was left out nor one long gone; the right one still opens."""
    async with case.session() as session:
        for _ in range(2):
            await train(session, [batch(session)], case.optimizer())
        gone = [0, 1] if case.client.capabilities.recovery != "step_token" else [0]
        for index in (3, -1, *gone):
            with refuses(BackendUserError, what=f"opening step {index} at position 2"):
                async with session.step(index):
                    pass
        await train(session, [batch(session)], case.optimizer())
        assert session.position == 3, f"position {session.position}"


@TRAINING_CLIENT
async def a_step_token_gives_the_stored_answer(case: TrainingClientCase) -> None:
    """Applying step k again changes nothing and answers as before."""
    if case.client.capabilities.recovery != "step_token":
        skip("it has no step tokens")
    async with case.session() as session:
        first = await train(session, [batch(session)], case.optimizer())
        before = await look(session)
        async with session.step(0) as step:
            await (await step.forward_backward(batch(session)))
            again = await (await step.apply(case.optimizer()))
        assert (again.step, again.grad_norm) == (first.step, first.grad_norm), "another answer"
        assert session.position == 1, f"position {session.position}"
        case.equal(before, await look(session), "weights after a step that was applied already")


async def _fails(session: TrainingSession, case: TrainingClientCase, poisoned: Datum) -> None:
    with refuses(NonFiniteLoss, what="a weight that is not finite") as refusal:
        await train(session, [[datum(session, 1)], [poisoned]], case.optimizer())
    error = refusal.error
    assert isinstance(error, NonFiniteLoss)
    assert poisoned.key in error.keys, f"the error names {error.keys}, not {poisoned.key!r}"


@TRAINING_CLIENT
async def a_loss_that_is_not_finite_changes_no_weight(case: TrainingClientCase) -> None:
    """The error names the batch's keys, nothing is applied, and the session goes on as if it had not been."""
    async with case.session() as session:
        await train(session, [batch(session)], case.optimizer())
        expected = await look(session)
        for value in (float("nan"), float("inf")):
            await _fails(session, case, datum(session, 2, weight=value))
            assert session.position == 1, f"position {session.position} after a step that failed"
            case.equal(expected, await look(session), "weights after a step that failed")
        await train(session, [batch(session)], case.optimizer())
        after = await look(session)
    async with case.session() as session:
        for _ in range(2):
            await train(session, [batch(session)], case.optimizer())
        case.equal(await look(session), after, "the step after one that failed")


@TRAINING_CLIENT
async def bad_data_is_refused(case: TrainingClientCase) -> None:
    """A missing input and a token outside the vocabulary; the session stays usable and nothing was added."""
    async with case.session() as session:
        good, vocab = datum(session, 1), session.info.vocab_size
        bad = {
            "without weights": Datum(good.inputs, {"target_tokens": good.loss_inputs["target_tokens"]}, "k"),
            "without targets": Datum(good.inputs, {"weights": good.loss_inputs["weights"]}, "k"),
            "with a token too large": Datum.from_tokens([1, vocab, 2], [1.0] * 3, "k"),
            "with a target too large": Datum.from_tokens([1, 2, vocab], [1.0] * 3, "k"),
            "with a negative token": Datum.from_tokens([1, -1, 2], [1.0] * 3, "k"),
        }
        for what, each in bad.items():
            with refuses(BackendUserError, what=f"a datum {what}"):
                async with session.step(0) as step:
                    await (await step.forward_backward([each]))
        await train(session, [batch(session)], case.optimizer())
        assert session.position == 1, "the session is not usable after bad data"


@TRAINING_CLIENT
async def an_unknown_loss_is_refused(case: TrainingClientCase) -> None:
    """With ``CapabilityError``; so is a custom one where none is taken."""
    losses: list[str | Loss] = ["no_such_loss"]
    if case.client.capabilities.custom_loss == "refused":
        losses.append(StatedCrossEntropy())
    async with case.session() as session:
        for loss in losses:
            with refuses(CapabilityError, what=f"the loss {loss}"):
                async with session.step(0) as step:
                    await (await step.forward_backward(batch(session), loss))


@TRAINING_CLIENT
async def a_stated_loss_equals_the_built_in_one(case: TrainingClientCase) -> None:
    """Cross entropy as a custom loss gives the same loss, metrics of its own, and the same update."""
    if case.client.capabilities.custom_loss == "refused":
        skip("it takes no custom loss")
    async with case.session() as session:
        before = await look(session)
        await train(session, [batch(session)], case.optimizer())
        expected = await look(session)
        case.moved(before, expected)
    async with case.session() as session:
        async with session.step(0) as step:
            built_in = await (await step.forward_backward(batch(session)))
        async with session.step(0) as step:
            stated = await (await step.forward_backward(batch(session), StatedCrossEntropy()))
            await (await step.apply(case.optimizer()))
        assert abs(stated.loss - built_in.loss) <= 100 * case.tolerance, f"{stated.loss}, {built_in.loss}"
        assert stated.metrics.get("rows") == 4, f"metrics {dict(stated.metrics)} are not sums"
        case.near(expected, await look(session), "the stated and the built-in loss")


class _Margin:
    """The difference of two sequences' log-probabilities: a loss of pairs that remembers what it saw."""

    name = "margin"
    group = 2

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def __call__(self, logprobs: Sequence[Float64Array], loss_inputs: Sequence[Mapping[str, Array]]) -> LossValue:
        first, second = (float(inputs["place"][0]) for inputs in loss_inputs)
        self.pairs.append((first, second))
        margin = float(np.sum(logprobs[0]) - np.sum(logprobs[1]))
        return LossValue(-margin, [-np.ones_like(logprobs[0]), np.ones_like(logprobs[1])], {"margin": margin})


@TRAINING_CLIENT
async def a_loss_of_pairs_gets_its_pairs(case: TrainingClientCase) -> None:
    """Consecutive datums stay together, however long they are; the margin grows by training."""
    if case.client.capabilities.custom_loss == "refused":
        skip("it takes no custom loss")
    loss = _Margin()
    async with case.session() as session:
        datums = [
            replace(d, loss_inputs={**d.loss_inputs, "place": np.full(len(d), i, np.float32)})
            for i, d in enumerate(batch(session))
        ]
        margins = []
        for number in range(2):
            async with session.step(number) as step:
                result = await (await step.forward_backward(datums, loss))
                await (await step.apply(case.optimizer(learning_rate=case.learning_rate / 10)))
                margins.append(result.metrics["margin"])
    assert set(loss.pairs) == {(0.0, 1.0), (2.0, 3.0)}, f"pairs {loss.pairs}"
    assert margins[1] > margins[0], f"margins {margins}"
