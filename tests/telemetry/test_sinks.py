"""What each sink shows of the same made-up run."""

import io
import json
import resource
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.errors import MissingExtra, StorageFull, StoreError
from crucible_kitchen.events import (
    DataPrepared,
    EvalComplete,
    Event,
    EventRecord,
    ModelRegistered,
    StageErrored,
    StageStart,
    StageStop,
    TrainingCheckpoint,
    TrainingEpoch,
    TrainingStep,
    WarningRaised,
    WorkflowStart,
    WorkflowStop,
)
from crucible_kitchen.telemetry import ConsoleSink, JsonlSink, PrometheusSink, RunInfo, Sink, TensorBoardSink

pytestmark = pytest.mark.anyio


def made_up_run(run_id: str = "run-1", steps: int = 4, seconds_per_step: float = 0.5) -> list[EventRecord]:
    path = "supervised/train_step"
    events: list[tuple[float, Event]] = [
        (0.0, WorkflowStart(recipe="supervised", config={"model": "tiny"})),
        (
            0.0,
            DataPrepared(
                dataset="sums", fingerprint="f", rows=100, tokens=2000, trained_tokens=500, truncated=2, steps=steps
            ),
        ),
    ]
    for step in range(1, steps + 1):
        at = step * seconds_per_step
        events += [
            (at, StageStart(stage="train_step", recipe="supervised", path=path)),
            (at, StageStop(stage="train_step", recipe="supervised", path=path, duration_s=0.02)),
            (
                at,
                TrainingStep(
                    step=step,
                    epoch=0,
                    loss=1 / step,
                    lr=0.001,
                    tokens_per_sec=1234.5,
                    grad_norm=float("inf") if step == 2 else 0.5,
                    total_steps=steps,
                ),
            ),
        ]
    end = steps * seconds_per_step
    events += [
        (end, TrainingEpoch(epoch=0, steps=steps, avg_loss=0.52)),
        (end, TrainingCheckpoint(step=steps, path="/secret/place")),
        (
            end,
            StageErrored(
                stage="evaluate",
                recipe="supervised",
                path="supervised/evaluate",
                attempt=1,
                code="backend.transient",
                message="lost",
                action="retry",
            ),
        ),
        (end, EvalComplete(step=steps, sample_count=50, accuracy=0.97, f1=0.96, precision=0.95, recall=0.94)),
        (end, WarningRaised(code="c", message="mind [bold]the gap[/bold]")),
        (end, ModelRegistered(model_id="m", model_name="sums", version=3, uri="blob://sha256/aa")),
        (end, WorkflowStop(recipe="supervised", status="completed", duration_s=2.5)),
    ]
    return [EventRecord(run_id, i, at, event) for i, (at, event) in enumerate(events, 1)]


async def play(sink: Sink, records: Sequence[EventRecord], size: int = 5) -> None:
    await sink.open(RunInfo(records[0].run_id, "supervised"))
    for i in range(0, len(records), size):
        await sink.handle(records[i : i + size])
    await sink.aclose()
    await sink.aclose()


async def test_off_a_terminal_the_console_prints_plain_lines() -> None:
    out = io.StringIO()
    await play(ConsoleSink(file=out, interval=0.0), made_up_run())
    assert out.getvalue().splitlines() == [
        "run run-1 of supervised started",
        "dataset sums: 100 rows, 2,000 tokens, 500 trained on, 2 rows truncated; 4 steps",
        "step 1/4  epoch 0  loss 1  lr 0.001  grad norm 0.5  1,234 tok/s",
        "step 2/4  epoch 0  loss 0.5  lr 0.001  grad norm inf  1,234 tok/s  ETA 0:00:01",
        "step 3/4  epoch 0  loss 0.3333  lr 0.001  grad norm 0.5  1,234 tok/s  ETA 0:00:00",
        "step 4/4  epoch 0  loss 0.25  lr 0.001  grad norm 0.5  1,234 tok/s  ETA 0:00:00",
        "epoch 0 ended: mean loss 0.52 over 4 steps",
        "checkpoint of step 4 saved",
        "stage supervised/evaluate failed, attempt 1 (backend.transient): lost; retry",
        "evaluation at step 4: accuracy 0.970  f1 0.960  precision 0.950  recall 0.940  on 50 held-out rows",
        "warning: mind [bold]the gap[/bold]",
        "registered sums:3 (blob://sha256/aa)",
        "run run-1 completed after 2.5 s",
    ]


async def test_the_console_prints_at_most_one_step_per_interval_and_the_last() -> None:
    out = io.StringIO()
    await play(ConsoleSink(file=out, interval=10.0), made_up_run(steps=101))
    steps = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step")]
    assert steps == ["1/101", "21/101", "41/101", "61/101", "81/101", "101/101"]


async def test_on_a_terminal_the_console_shows_a_progress_bar_with_figures() -> None:
    out = io.StringIO()
    await play(ConsoleSink(file=out, terminal=True), made_up_run(), size=1)
    text = out.getvalue()
    for figure in ("supervised", "4/4", "loss 0.25", "1,234 tok/s", "ETA 0:00:01", "accuracy 0.970", "sums:3"):
        assert figure in text
    assert text.count("epoch 0 ended") == 1
    assert not any(thread.name.startswith(("crucible", "rich")) for thread in threading.enumerate())


async def test_a_failed_run_says_where_and_why() -> None:
    out = io.StringIO()
    error = {"code": "data.row", "message": "row 3, field 'text': is missing", "where": "supervised/load_dataset"}
    stop = WorkflowStop(recipe="supervised", status="failed", duration_s=0.25, error=error)
    await play(ConsoleSink(file=out), [EventRecord("r", 1, 0.0, stop)])
    assert out.getvalue() == "run r failed after 0.2 s at supervised/load_dataset\n"


async def test_the_console_shows_runs_side_by_side() -> None:
    out = io.StringIO()
    sink = ConsoleSink(file=out, terminal=True)
    one, two = made_up_run("a"), made_up_run("b")
    for name in ("a", "b"):
        await sink.open(RunInfo(name, f"flow-{name}"))
    for first, second in zip(one, two, strict=True):
        await sink.handle([first])
        await sink.handle([second])
    await sink.aclose()
    assert "flow-a" in out.getvalue()
    assert "flow-b" in out.getvalue()


async def test_jsonl_holds_every_event_once_even_when_a_batch_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "events.jsonl"
    records = made_up_run()
    sink = JsonlSink(path)
    await sink.open(RunInfo("run-1", "supervised"))
    await sink.handle(records[:10])
    assert len(path.read_text().splitlines()) == 10
    await sink.handle(records[:10])
    await sink.handle(records[8:])
    await sink.aclose()

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, len(records) + 1))
    assert lines[0] == {
        "seq": 1,
        "time": 0.0,
        "run_id": "run-1",
        "event": "workflow.start",
        "recipe": "supervised",
        "config": {"model": "tiny"},
        "attempt": 1,
    }
    assert [line["grad_norm"] for line in lines if line["event"] == "training.step"] == [0.5, None, 0.5, 0.5]


async def test_jsonl_appends_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for run_id in ("a", "b"):
        await play(JsonlSink(path), made_up_run(run_id))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["run_id"] for line in lines].count("a") == len(lines) / 2


async def test_jsonl_that_cannot_be_opened_raises_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = JsonlSink(tmp_path / "file" / "events.jsonl")
    with pytest.raises(StoreError):
        await sink.open(RunInfo("r", "w"))
    await sink.aclose()


async def test_a_write_that_fails_half_way_leaves_whole_lines_and_can_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    records = made_up_run(steps=200)
    sink = JsonlSink(path)
    await sink.open(RunInfo("run-1", "supervised"))
    await sink.handle(records[:3])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a file that must not grow is a disk that is full
    try:
        with pytest.raises(StorageFull):
            await sink.handle(records[3:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(path.read_text().splitlines()) == 3
    await sink.handle(records[3:])
    await sink.aclose()
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == list(range(1, len(records) + 1))


async def test_prometheus_counts_a_run() -> None:
    sink = PrometheusSink()
    await play(sink, made_up_run())
    one = {"workflow": "supervised"}

    def value(name: str, **labels: str) -> float | None:
        return sink.registry.get_sample_value(name, one | labels)

    assert value("crucible_stage_seconds_count", stage="train_step") == 4
    assert value("crucible_stage_seconds_sum", stage="train_step") == pytest.approx(0.08)
    assert value("crucible_stage_errors_total", stage="evaluate") == 1
    assert value("crucible_training_steps_total") == 4
    assert value("crucible_training_loss") == 0.25
    assert value("crucible_training_learning_rate") == 0.001
    assert value("crucible_training_tokens_per_second") == 1234.5
    assert value("crucible_training_grad_norm") == 0.5
    assert value("crucible_eval_accuracy") == 0.97
    assert value("crucible_eval_samples") == 50
    assert value("crucible_models_registered_total") == 1
    assert value("crucible_runs_total", status="completed") == 1
    assert value("crucible_runs_active") == 0


async def test_prometheus_labels_stay_few_and_hold_no_run() -> None:
    sink = PrometheusSink()
    await sink.open(RunInfo("run-xyz", "supervised"))
    await sink.handle(
        [
            EventRecord("run-xyz", i, 0.0, StageStop(stage=f"s{i}", recipe="w", path=f"w/s{i}", duration_s=0.1))
            for i in range(1, 1001)
        ]
    )
    samples = [sample for metric in sink.registry.collect() for sample in metric.samples]
    assert len({sample.labels.get("stage") for sample in samples}) <= 203
    assert sink.registry.get_sample_value(
        "crucible_stage_seconds_count", {"workflow": "supervised", "stage": "other"}
    ) == pytest.approx(800)
    assert not any("run-xyz" in str(sample.labels) or "/" in str(sample.labels) for sample in samples)
    assert sink.registry.get_sample_value("crucible_runs_active", {"workflow": "supervised"}) == 1
    await sink.aclose()
    assert sink.registry.get_sample_value("crucible_runs_active", {"workflow": "supervised"}) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    await play(TensorBoardSink(tmp_path), made_up_run())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run-1"))
    found.Reload()
    loss = found.Scalars("train/loss")
    assert [(s.step, s.value) for s in loss] == [(i, pytest.approx(1 / i)) for i in range(1, 5)]
    assert [(s.step, s.value) for s in found.Scalars("eval/accuracy")] == [(4, pytest.approx(0.97))]
    assert [s.wall_time for s in loss] == [0.5, 1.0, 1.5, 2.0]


async def test_without_tensorboard_the_sink_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    sink = TensorBoardSink(tmp_path)
    with pytest.raises(MissingExtra, match="tensorboard"):
        await sink.open(RunInfo("r", "w"))
    await sink.aclose()
