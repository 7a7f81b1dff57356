"""The course of the learning rate: laws, golden numbers, and the usual implementations."""

import itertools
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_kitchen.config import OptimConfig
from crucible_kitchen.learner.schedules import Schedule, learning_rate, warmup_steps

SCHEDULES = get_args(Schedule)
runs = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(SCHEDULES),
        "total_steps": st.integers(1, 400),
        "warmup_steps": st.integers(0, 450),
        "end": st.floats(1e-6, 1),
        "power": st.floats(0.1, 6),
        "peak": st.floats(1e-8, 10),
    }
)


@given(run=runs)
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(run):
    rates = [learning_rate(k, **run) for k in range(run["total_steps"])]
    assert all(0 < rate <= run["peak"] * (1 + 1e-12) for rate in rates)


@given(run=runs)
def test_the_rate_rises_to_the_peak_and_then_never_rises_again(run):
    rates = [learning_rate(k, **run) for k in range(run["total_steps"])]
    turn = min(run["warmup_steps"], len(rates))
    slack = 1e-12 * run["peak"]
    assert all(a <= b + slack for a, b in itertools.pairwise(rates[:turn]))
    assert all(a >= b - slack for a, b in itertools.pairwise(rates[turn:]))
    if run["warmup_steps"] < run["total_steps"]:
        assert rates[run["warmup_steps"]] == pytest.approx(run["peak"])


@given(
    total=st.integers(1, 300), warmup=st.integers(0, 299), schedule=st.sampled_from(["linear", "cosine", "polynomial"])
)
def test_without_an_end_the_last_step_is_still_used(total, warmup, schedule):
    values = {"total_steps": total, "warmup_steps": min(warmup, total - 1), "peak": 1.0, "schedule": schedule}
    assert learning_rate(total - 1, **values) > 0


@given(run=runs)
def test_the_last_step_is_above_the_end_by_one_step_of_the_way(run):
    run["warmup_steps"] = min(run["warmup_steps"], run["total_steps"] - 1)
    share = 1 if run["schedule"] == "constant" else run["end"]
    assert learning_rate(run["total_steps"] - 1, **run) >= run["peak"] * share * (1 - 1e-12)


def test_ten_steps_of_each_by_hand():
    def rates(schedule, **values):
        return [round(learning_rate(k, 10, peak=1.0, schedule=schedule, **values), 6) for k in (0, 1, 2, 6, 9)]

    assert rates("constant", warmup_steps=2) == [0.333333, 0.666667, 1, 1, 1]
    assert rates("linear", warmup_steps=2) == [0.333333, 0.666667, 1, 0.5, 0.125]
    assert rates("linear", warmup_steps=2, end=0.5) == [0.333333, 0.666667, 1, 0.75, 0.5625]
    assert rates("cosine", warmup_steps=2) == [0.333333, 0.666667, 1, 0.5, 0.03806]
    assert rates("polynomial", warmup_steps=2, power=2) == [0.333333, 0.666667, 1, 0.25, 0.015625]
    assert rates("exponential", warmup_steps=2, end=0.01) == [0.333333, 0.666667, 1, 0.1, 0.017783]


@given(total=st.integers(1, 100), power=st.just(1.0), end=st.floats(0, 1), k=st.integers(0, 99))
def test_a_polynomial_of_power_one_is_linear(total, power, end, k):
    values, k = {"peak": 1.0, "end": end}, k % total
    linear = learning_rate(k, total, schedule="linear", **values)
    assert learning_rate(k, total, schedule="polynomial", power=power, **values) == pytest.approx(linear)


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_the_decay_is_that_of_transformers(kind):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    total, options = 20, {"lr_end": 1e-7, "power": 2.0} if kind == "polynomial" else {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = getattr(transformers, f"get_{kind}{'_decay' if kind == 'polynomial' else ''}_schedule_with_warmup")(
        optimizer, num_warmup_steps=0, num_training_steps=total, **options
    )
    for k in range(total):
        ours = learning_rate(k, total, peak=0.5, schedule=kind, end=1e-7 / 0.5 if options else 0.0)
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


def test_the_schedules_are_those_of_the_config():
    assert set(get_args(OptimConfig.model_fields["lr_schedule"].annotation)) == set(SCHEDULES)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.1, 3), (0.999, 30), (1, 1), (7, 7), (100, 30), (0.01, 1)])
def test_warm_up_is_a_share_or_a_number_of_steps(warmup, steps):
    assert warmup_steps(warmup, 30) == steps


def test_a_share_that_is_a_whole_number_of_steps_is_not_rounded_up_by_its_last_bit():
    assert 0.07 * 100 > 7
    assert warmup_steps(0.07, 100) == 7


@pytest.mark.parametrize(
    "values",
    [
        {"step": -1},
        {"step": 10},
        {"total_steps": 0},
        {"schedule": "exponential", "end": 0.0},
    ],
)
def test_what_makes_no_sense_is_refused(values):
    with pytest.raises(ValueError):
        learning_rate(**{"step": 0, "total_steps": 10, "peak": 1.0, "schedule": "linear", **values})
