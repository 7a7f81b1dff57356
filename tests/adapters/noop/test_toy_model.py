"""The toy model is a real one: its gradient is the derivative, its optimizer AdamW, its samples its distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SamplingParams
from crucible_kitchen_noop.model import Accumulation, BigramModel, token_logprobs
from crucible_kitchen_noop.outputs import Weights, backward, compute
from crucible_kitchen_noop.sampler import NoopSampler
from crucible_kitchen_noop.tokenizer import ByteTokenizer

V = 7
TOKENS = np.array([1, 2, 2, 5], dtype=np.int64)
TARGETS = np.array([2, 2, 5, 0], dtype=np.int64)


def total(model, weights):
    return float(np.sum(weights * token_logprobs(model.table(), TOKENS, TARGETS)))


@pytest.mark.parametrize("lora", [None, LoraSpec(3, alpha=6.0)], ids=["all_weights", "lora"])
def test_the_gradient_is_the_derivative(lora):
    model, rng = BigramModel(V, 3, lora), np.random.default_rng(0)
    for weight in model.weights.values():
        weight += rng.normal(0, 0.3, weight.shape)
    weights = rng.normal(size=4)
    datum = Datum({"tokens": TOKENS}, {"target_tokens": TARGETS})
    found = np.zeros((V, V + 1))
    backward(Weights(model.table()), datum, {"logprobs": weights}, found)
    for name, gradient in model.gradients(found).items():
        for place in np.ndindex(gradient.shape):
            kept = model.weights[name][place]
            model.weights[name][place] = kept + 1e-6
            above = total(model, weights)
            model.weights[name][place] = kept - 1e-6
            below = total(model, weights)
            model.weights[name][place] = kept
            assert abs((above - below) / 2e-6 - gradient[place]) < 1e-8


@pytest.mark.parametrize("output", ["logprobs", "values", "entropy", "top_logprobs", "logits"])
def test_the_derivative_of_every_output_is_right(output):
    rng = np.random.default_rng(1)
    table, values = rng.normal(size=(V, V)), rng.normal(size=V)
    teacher = rng.integers(0, V, (4, 3))
    datum = Datum({"tokens": TOKENS}, {"target_tokens": TARGETS, "teacher_tokens": teacher})
    slopes = rng.normal(size=compute(Weights(table, values), datum, [output])[output].shape)
    found = np.zeros((V, V + 1))
    backward(Weights(table, values), datum, {output: slopes}, found)
    packed = np.concatenate([table, values[:, None]], axis=1)

    def summed(changed):
        return float((slopes * compute(Weights(changed[:, :-1], changed[:, -1]), datum, [output])[output]).sum())

    for place in np.ndindex(packed.shape):
        step = np.zeros_like(packed)
        step[place] = 1e-6
        assert abs((summed(packed + step) - summed(packed - step)) / 2e-6 - found[place]) < 1e-8


def test_the_optimizer_is_the_adamw_of_torch():
    torch = pytest.importorskip("torch")
    model, rng = BigramModel(V, 3, None), np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.tensor(model.weights["table"].copy()))
    params = AdamParams(0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    reference = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    for _ in range(5):
        gradient = rng.normal(size=(V, V))
        weight.grad = torch.tensor(gradient)
        reference.step()
        model.apply({"table": gradient}, params)
    assert np.max(np.abs(model.weights["table"] - weight.detach().numpy())) < 1e-12


@given(st.permutations(range(6)), st.integers(0, 100))
def test_the_sum_of_ordered_gradients_has_the_same_bits_in_every_order_of_arrival(arrival, seed):
    gradients = np.random.default_rng(seed).normal(size=(6, 2, 2)) * 10.0 ** np.arange(6)[:, None, None]
    orders = [0, 1, 3, 4, 8, 9]
    sums = []
    for places in (range(6), arrival):
        accumulation = Accumulation()
        for place in places:
            accumulation.add(gradients[place], orders[place])
        sums.append(accumulation.total())
    assert sums[0].tobytes() == sums[1].tobytes()


def sampler(table):
    return NoopSampler(table, 0, lambda: 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, np.array([0.25, 0.09, 0.04]) / 0.38),
        ({"top_k": 2}, [0.625, 0.375, 0.0]),
        ({"top_p": 0.6}, [0.625, 0.375, 0.0]),
        ({"top_p": 0.5}, [1.0, 0.0, 0.0]),
        ({"top_k": 2, "top_p": 0.1}, [1.0, 0.0, 0.0]),
    ],
)
async def test_samples_follow_the_processed_distribution(changes, expected):
    table = np.full((258, 258), -1e9)
    table[:, [65, 66, 67]] = np.log([0.5, 0.3, 0.2])
    params = SamplingParams(**({"max_tokens": 4000, "seed": 5} | changes))
    (sample,) = await sampler(table).sample([65], params)
    shares = np.array([np.mean(sample.tokens == token) for token in (65, 66, 67)])
    assert np.max(np.abs(shares - expected)) < 0.03
    stated = np.exp(sample.logprobs)
    for token, probability in zip((65, 66, 67), expected, strict=True):
        assert np.allclose(stated[sample.tokens == token], probability, atol=1e-6)


@given(st.text(max_size=40))
def test_text_survives_the_tokenizer(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_recognised_and_not_decoded():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("<|begin|>a<|end|>") == [257, 97, 256]
    assert tokenizer.decode([257, 97, 256]) == "a"


@settings(max_examples=20)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_a_conversation_begins_with_its_prompt(texts):
    from crucible_kitchen.types import Message

    tokenizer = ByteTokenizer()
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    prompt = tokenizer.render_chat(turns, generation_prompt=True)
    whole = tokenizer.render_chat([*turns, Message("assistant", "yes")], generation_prompt=False)
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_id
