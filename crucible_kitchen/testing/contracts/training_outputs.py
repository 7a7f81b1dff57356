"""The contract of what a model says beyond log-probabilities: values, entropy, top tokens, logits, a reference.

Adds to the suite of ``training_client``. What a backend does not have it must refuse; what it has is held to the
formulas, computed here from its logits where it gives those. Knows no adapter. Read next:
``crucible_kitchen.types.Output``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError, CrucibleError
from crucible_kitchen.learner.distillation import GeneralizedJSD, TopKForwardKL
from crucible_kitchen.learner.numerics import log_softmax
from crucible_kitchen.learner.reward import BradleyTerry
from crucible_kitchen.learner.terms import EntropyBonus, Term, WeightedSum
from crucible_kitchen.ports import TrainingSession
from crucible_kitchen.testing.contracts.base import close, refuses, same_bits, skip
from crucible_kitchen.testing.contracts.training_case import (
    TRAINING_CLIENT,
    StatedCrossEntropy,
    TrainingClientCase,
    batch,
    datum,
    look,
    train,
)
from crucible_kitchen.types import OUTPUTS, Array, Datum, LossValue, Output

__all__: list[str] = []

_FIELDS: dict[Output, str] = {
    "values": "value_head",
    "entropy": "entropy",
    "top_logprobs": "topk_logprobs",
    "logits": "full_logits",
}


def _has(case: TrainingClientCase, output: Output) -> bool:
    return bool(getattr(case.client.capabilities, _FIELDS[output]))


def _skip_without_losses(case: TrainingClientCase) -> None:
    if case.client.capabilities.custom_loss == "refused":
        skip("it takes no custom loss")


async def _ask(session: TrainingSession, datums: Sequence[Datum], output: Output, **more: Any) -> list[Array]:
    result = await (await session.forward(datums, outputs=(output,), **more))
    return [np.asarray(found, dtype=np.float64) for found in result.outputs[output]]


@TRAINING_CLIENT
async def an_output_that_is_not_there_is_refused(case: TrainingClientCase) -> None:
    """By ``forward`` and by a loss that reads it, naming what to use instead; the session stays usable."""
    async with case.session() as session:
        lacking = [o for o in OUTPUTS if o in _FIELDS and not getattr(session.capabilities, _FIELDS[o])]
        assert "values" in lacking, "a session opened without a value head has one"
        for output in lacking:
            with refuses(CapabilityError, what=f"the output {output}") as refusal:
                await (await session.forward(batch(session), outputs=(output,), top=1))
            assert isinstance(refusal.error, CrucibleError)
            assert refusal.error.hint, f"refusing {output} names no alternative"
            with refuses(CapabilityError, what=f"a loss of {output}"):
                async with session.step(0) as step:
                    loss = WeightedSum(Term(StatedCrossEntropy(), output))
                    await (await step.forward_backward(batch(session), loss))
        await train(session, [batch(session)], case.optimizer())


@TRAINING_CLIENT
async def a_session_without_a_reference_refuses_to_compute_with_it(case: TrainingClientCase) -> None:
    """Also where the backend has none at all, when it is asked to keep one."""
    async with case.session() as session:
        with refuses(CapabilityError, what="computing with a reference that was not kept"):
            await (await session.forward(batch(session), reference=True))
    if not case.client.capabilities.reference:
        with refuses(CapabilityError, what="keeping a reference"):
            async with case.session(reference=True):
                pass


@TRAINING_CLIENT
async def the_reference_is_the_model_as_it_was_opened(case: TrainingClientCase) -> None:
    """Bit for bit what ``forward`` gave before the first step; training and loading a state do not move it."""
    if not case.client.capabilities.reference:
        skip("it keeps no reference")
    async with case.session(reference=True) as session:
        before = await look(session)
        datums = [datum(session, number) for number in range(6)]

        async def reference() -> list[Array]:
            return [np.asarray(x) for x in (await (await session.forward(datums, reference=True))).logprobs]

        same_bits(before, await reference(), "the reference at step 0")
        await train(session, [batch(session)], case.optimizer())
        state = await (await session.save_state("one"))
        case.moved(before, await look(session))
        same_bits(before, await reference(), "the reference after a step")
        await session.load_state(state)
        same_bits(before, await reference(), "the reference after loading")
        case.moved(before, await look(session))
    async with case.session(reference=True) as other:
        await other.load_state(state)
        found = (await (await other.forward(datums, reference=True))).logprobs
        case.equal(before, [np.asarray(x) for x in found], "the reference of a session that resumed")


@TRAINING_CLIENT
async def a_new_value_head_says_zero_and_learns(case: TrainingClientCase) -> None:
    """Trained beside the policy in one step; saved and restored bit for bit; scores are the last values."""
    if not _has(case, "values"):
        with refuses(CapabilityError, what="a value head"):
            async with case.session(value_head=True):
                pass
        skip("it has no value head")
    _skip_without_losses(case)
    async with case.session(value_head=True) as session:
        assert session.capabilities.value_head, "a session with a value head does not say so"
        datums = batch(session)
        same_bits([np.zeros(len(d)) for d in datums], await _ask(session, datums, "values"), "values at first")
        plain = await look(session)
        loss = WeightedSum(Term(StatedCrossEntropy()), Term(_Squares(), "values", 0.5))
        losses = []
        for number in range(3):
            async with session.step(number) as step:
                result = await step.forward_backward(datums, loss)
                await (await step.apply(case.optimizer(learning_rate=case.learning_rate / 10)))
                losses.append((await result).loss)
        assert [x.shape for x in (await result).outputs["values"]] == [(len(d),) for d in datums], "values' shapes"
        assert losses == sorted(losses, reverse=True), f"losses {losses}"
        case.moved(plain, await look(session))
        values = await _ask(session, datums, "values")
        assert all(np.any(v != 0) for v in values), "the value head did not move"
        state = await (await session.save_state("valued"))
        sequences = [d.inputs["tokens"].tolist() for d in datums]
        if case.client.capabilities.sampling:
            scores = await (await session.sampler()).score(sequences)
            close([scores], [np.array([v[-1] for v in values])], max(case.tolerance, 1e-5), "scores and last values")
        await train(session, [datums], case.optimizer(), loss=loss)
        future = await _ask(session, datums, "values")
        case.moved(values, future)
        await session.load_state(state)
        case.equal(values, await _ask(session, datums, "values"), "values after loading")
    async with case.session(value_head=True) as other:
        await other.load_state(state)
        await train(other, [datums], case.optimizer(), loss=loss)
        case.equal(future, await _ask(other, datums, "values"), "values trained after loading elsewhere")


class _Squares:
    """Half the squared distance of values from 1 where positions count."""

    name = "squares"
    group = 1

    def __call__(self, values: Any, loss_inputs: Any, /) -> Any:
        w, off = loss_inputs[0]["weights"].astype(np.float64), np.asarray(values[0]) - 1.0
        w = np.where(w != 0, w, 0.0)
        off = np.where(w != 0, off, 0.0)
        return LossValue(float(w @ off**2) / 2, [w * off], {})


@TRAINING_CLIENT
async def a_reward_model_learns_to_prefer(case: TrainingClientCase) -> None:
    """Bradley-Terry on the values of last tokens: the scores of chosen answers rise above those of rejected ones."""
    if not _has(case, "values"):
        skip("it has no value head")
    _skip_without_losses(case)
    pairs = []
    async with case.session(value_head=True) as session:
        for number in range(3):
            for last in (10, 11):
                tokens = [number + 20, number + 30, last]
                pairs.append(
                    Datum(
                        {"tokens": np.array(tokens, np.int64)}, {"weights": np.array([0, 0, 1], np.float32)}, str(last)
                    )
                )
        loss = WeightedSum(Term(BradleyTerry(), "values"))
        history = []
        for number in range(8):
            async with session.step(number) as step:
                result = await step.forward_backward(pairs, loss)
                await (await step.apply(case.optimizer(learning_rate=case.learning_rate / 10)))
                history.append(await result)
    assert abs(history[0].loss - 3 * np.log(2)) < 1e-5, f"the loss at first is {history[0].loss}, not 3 ln 2"
    assert len(history[0].logprobs) == 0, "log-probabilities that the loss does not read were computed"
    assert history[-1].metrics["margin"] > history[0].metrics["margin"], "the margin did not grow"
    assert history[-1].metrics["accuracy"] == 3, f"metrics {dict(history[-1].metrics)}"


@TRAINING_CLIENT
async def outputs_agree_with_the_logits(case: TrainingClientCase) -> None:
    """Log-probabilities, entropy and top tokens are those of ``softmax(logits)``; logits can be read in pieces."""
    if not _has(case, "logits"):
        skip("it does not give its logits")
    async with case.session() as session:
        await train(session, [batch(session)], case.optimizer())
        datums = batch(session)
        views = (await (await session.forward(datums, outputs=("logits",)))).outputs["logits"]
        every = [log_softmax(np.asarray(view)) for view in views]
        shapes = [(len(d), session.info.vocab_size) for d in datums]
        assert [tuple(view.shape) for view in views] == shapes, "shapes of logits"
        close([np.asarray(views[0])[1:3]], [np.asarray(views[0][1:3])], case.tolerance, "a piece of the logits")
        targets = [d.loss_inputs["target_tokens"] for d in datums]
        forward = (await (await session.forward(datums))).logprobs
        picked = [e[np.arange(len(e)), t] for e, t in zip(every, targets, strict=True)]
        case.near(picked, forward, "log-probabilities and logits")
        if session.capabilities.entropy:
            exact = [-(np.exp(e) * e).sum(-1) for e in every]
            case.near(exact, await _ask(session, datums, "entropy"), "entropy and logits")
        if session.capabilities.topk_logprobs:
            result = (await (await session.forward(datums, outputs=("top_logprobs",), top=3))).outputs
            best = [np.sort(e, axis=-1)[:, :-4:-1] for e in every]
            case.near(best, [np.asarray(x) for x in result["top_logprobs"]], "top log-probabilities and logits")
            named = [np.take_along_axis(e, t, -1) for e, t in zip(every, result["top_tokens"], strict=True)]
            case.near(named, [np.asarray(x) for x in result["top_logprobs"]], "top tokens and logits")
            with refuses(BackendUserError, what="the 0 likeliest tokens"):
                await (await session.forward(datums, outputs=("top_logprobs",), top=0))


@TRAINING_CLIENT
async def more_entropy_is_less_loss(case: TrainingClientCase) -> None:
    """The exact bonus raises the entropy that it reports."""
    if not _has(case, "entropy"):
        skip("it does not give the entropy")
    _skip_without_losses(case)
    async with case.session() as session:
        await train(session, [batch(session)], case.optimizer(learning_rate=case.learning_rate / 5))
        loss = WeightedSum(Term(EntropyBonus(), "entropy"))
        found = []
        for _ in range(3):
            async with session.step(session.position) as step:
                result = await step.forward_backward(batch(session), loss)
                await (await step.apply(case.optimizer(learning_rate=case.learning_rate / 100, beta1=0.0)))
                found.append((await result).metrics["exact_entropy"])
    assert found == sorted(found), f"entropies {found}"
    assert found[-1] > found[0], f"entropies {found}"


@TRAINING_CLIENT
async def distilling_lowers_the_divergence(case: TrainingClientCase) -> None:
    """On the teacher's top tokens, and on its logits; a teacher's own outputs are what the loss takes."""
    methods: list[tuple[Output, Any, str]] = [
        ("top_logprobs", TopKForwardKL(rest="tail"), "kl"),
        ("logits", GeneralizedJSD(beta=0.5, temperature=2.0), "jsd"),
    ]
    tried = [m for m in methods if _has(case, m[0])]
    if not tried:
        skip("it gives neither top tokens nor logits")
    _skip_without_losses(case)
    for output, loss, metric in tried:
        async with case.session(seed=2) as teacher, case.session() as student:
            datums = batch(student)
            await train(teacher, [datums], case.optimizer())  # two seeds of a model from a file are one model
            said = (await (await teacher.forward(datums, outputs=(output,), top=4))).outputs
            names = {"top_logprobs": "teacher_logprobs", "top_tokens": "teacher_tokens", "logits": "teacher_logits"}
            taught = [
                replace(d, loss_inputs={**d.loss_inputs, **{names[key]: arrays[i] for key, arrays in said.items()}})
                for i, d in enumerate(datums)
            ]
            found = []
            for number in range(3):
                async with student.step(number) as step:
                    result = await step.forward_backward(taught, WeightedSum(Term(loss, output)))
                    await (await step.apply(case.optimizer(learning_rate=case.learning_rate / 10)))
                    found.append((await result).metrics[metric])
            assert found == sorted(found, reverse=True), f"{loss.name}: divergences {found}"
            assert found[-1] < found[0], f"{loss.name}: divergences {found}"
