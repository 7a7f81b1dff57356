"""The evaluator that counts: its port's contract, equality with scikit-learn, concurrency, documents."""

import json
from collections.abc import Sequence

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_kitchen.errors import BackendError, ConfigError
from crucible_kitchen.ports import EvalExample, EvalReport, Evaluator, Prediction
from crucible_kitchen.testing import contracts
from crucible_kitchen_metrics import MetricsEvaluator
from crucible_kitchen_metrics.classification import (
    METRICS,
    bootstrap_intervals,
    classification_metrics,
    label_ids,
)
from crucible_kitchen_metrics.report import render_html, render_json, render_markdown

labelled = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdefgh")), min_size=1, max_size=60)


@pytest.mark.anyio
@pytest.mark.parametrize("check", contracts.EVALUATOR, ids=contracts.name)
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_it_keeps_the_contract(check) -> None:
    evaluator = MetricsEvaluator(chunk=3)
    assert isinstance(evaluator, Evaluator)
    await check(contracts.EvaluatorCase(evaluator))


def metrics_of(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    return classification_metrics(*label_ids([r for r, _ in pairs], [p for _, p in pairs]))


@settings(max_examples=150, deadline=None)
@given(pairs=labelled)
def test_the_metrics_are_those_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    references, predictions = zip(*pairs, strict=True)
    found = metrics_of(pairs)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(references, predictions), abs=1e-12)
    for average in ("macro", "micro", "weighted"):
        expected = sklearn.precision_recall_fscore_support(references, predictions, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            assert found[f"{name}_{average}"] == pytest.approx(value, abs=1e-12), (name, average)


def slow_macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    scores = []
    for label in {text for pair in pairs for text in pair}:
        tp = sum(r == p == label for r, p in pairs)
        scores.append(2 * tp / sum((r == label) + (p == label) for r, p in pairs))
    return sum(scores) / len(scores)


@settings(max_examples=30, deadline=None)
@given(pairs=labelled, seed=st.integers(0, 9))
def test_the_vectorised_bootstrap_is_the_plain_one(pairs: list[tuple[str, str]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(pairs), size=(50, len(pairs)))
    scores = [slow_macro_f1([pairs[i] for i in row]) for row in drawn]
    low, high = np.quantile(scores, [0.025, 0.975])
    value = slow_macro_f1(pairs)
    ids = label_ids([r for r, _ in pairs], [p for _, p in pairs])
    found = bootstrap_intervals(*ids, seed=seed, resamples=50)["f1_macro"]
    assert found == pytest.approx((min(low, value), max(high, value)), abs=1e-12)


@given(pairs=labelled, order=st.randoms(use_true_random=False))
def test_the_order_of_the_examples_does_not_matter(pairs: list[tuple[str, str]], order) -> None:
    shuffled = list(pairs)
    order.shuffle(shuffled)
    assert metrics_of(shuffled) == pytest.approx(metrics_of(pairs), abs=1e-12)


def test_resampling_in_parts_gives_the_same_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = label_ids(["a", "b", "c"] * 20, ["a", "b", "b"] * 20)
    whole = bootstrap_intervals(*ids, seed=1, resamples=100)
    monkeypatch.setattr("crucible_kitchen_metrics.classification._CELLS", 600)
    assert bootstrap_intervals(*ids, seed=1, resamples=100) == whole


def test_the_interval_of_accuracy_has_the_width_of_a_binomial() -> None:
    n, p = 400, 0.8
    ids = label_ids(["a"] * n, ["a"] * int(n * p) + ["b"] * (n - int(n * p)))
    low, high = bootstrap_intervals(*ids, seed=0, resamples=4000)["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * (p * (1 - p) / n) ** 0.5, rel=0.1)


class Model:
    """Answers with the reference and watches how it is asked."""

    def __init__(self, *, forgets: int = 0) -> None:
        self.now = self.most = 0
        self.sizes: list[int] = []
        self.forgets = forgets

    async def __call__(self, examples: Sequence[EvalExample]) -> list[Prediction]:
        self.now += 1
        self.most = max(self.most, self.now)
        self.sizes.append(len(examples))
        await anyio.lowlevel.checkpoint()
        self.now -= 1
        return [Prediction(e.key, f"  {e.reference}\n") for e in examples][self.forgets :]


def examples(n: int) -> list[EvalExample]:
    return [EvalExample(f"k{i}", (1,), f"answer {i % 7}") for i in range(n)]


@pytest.mark.anyio
async def test_the_model_is_asked_in_chunks_of_which_a_few_run_at_a_time() -> None:
    model = Model()
    report = await MetricsEvaluator(chunk=10, concurrency=3, resamples=10).evaluate(model, examples(95))
    assert sorted(model.sizes) == [5] + [10] * 9
    assert 1 < model.most <= 3
    assert report.metrics["exact_match"] == 1.0
    assert set(report.metrics) == {*METRICS, "precision", "recall", "f1", "exact_match"} == set(report.intervals)


@pytest.mark.anyio
async def test_only_white_space_at_the_ends_is_forgiven() -> None:
    async def predict(asked: Sequence[EvalExample]) -> list[Prediction]:
        return [Prediction(e.key, e.key) for e in asked]

    asked = [EvalExample(" Yes ", (), "Yes"), EvalExample("yes", (), "Yes"), EvalExample("a  b", (), "a b")]
    report = await MetricsEvaluator().evaluate(predict, asked)
    assert report.mistakes == ("yes", "a  b")


@pytest.mark.anyio
async def test_answers_that_do_not_fit_the_questions_are_a_fault_not_a_score() -> None:
    with pytest.raises(BackendError):
        await MetricsEvaluator().evaluate(Model(forgets=1), examples(5))


def test_options_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError):
        MetricsEvaluator(chunk=0)


REPORT = EvalReport(
    metrics={"accuracy": 0.75, "f1": 0.5, "f1_macro": 0.5},
    intervals={"accuracy": (0.6, 0.9)},
    n=40,
    average="macro",
    mistakes=("<b>&amp;|x*", "k2"),
    synthetic=True,
)


def test_the_markdown_is_a_table_with_everything_escaped() -> None:
    text = render_markdown(REPORT)
    assert "| accuracy | 0.7500 | 0.6000 to 0.9000 |" in text
    assert "40 held-out examples" in text
    assert "synthetic" in text
    assert r"&lt;b&gt;&amp;amp;\|x\*" in text


def test_the_html_page_stands_alone_and_escapes() -> None:
    text = render_html(REPORT)
    assert "&lt;b&gt;&amp;amp;|x*" in text
    assert "<b>" not in text
    assert "left:60.00%;width:30.00%" in text
    for outside in ("<script", "http://", "https://", "src="):
        assert outside not in text


def test_the_json_holds_the_whole_report() -> None:
    value = json.loads(render_json(REPORT))
    assert value["metrics"] == dict(REPORT.metrics)
    assert value["intervals"]["accuracy"] == [0.6, 0.9]
    assert value["synthetic"] is True
