"""A sink that counts for Prometheus, and the server that lets itself be scraped.

Labels are the names of workflows and stages, of which a program has few; never a run's id or a path, of which it has
ever more. Read next: ``crucible_kitchen.telemetry.sinks``.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

from crucible_kitchen import events as e
from crucible_kitchen.errors import ConfigError
from crucible_kitchen.events import EventRecord
from crucible_kitchen.telemetry.sinks import RunInfo
from crucible_kitchen.workers import run_sync

__all__ = ["MetricsServer", "PrometheusSink", "serve_metrics"]

_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0)
_MOST_NAMES = 200
"""Most different workflows, and most stages of one workflow; further ones are counted as ``other``."""


class _Measured(dict[str, Gauge]):
    """A workflow's gauges, each there once it was measured: what nobody measured is absent, not zero."""

    def __init__(self, gauges: dict[str, Gauge], workflow: str) -> None:
        super().__init__()
        self._gauges = gauges
        self._workflow = workflow

    def __missing__(self, name: str) -> Gauge:
        gauge = self[name] = self._gauges[name].labels(self._workflow)
        return gauge


class _Bound:
    """One workflow's metrics with their labels filled in once, because filling in costs more than counting."""

    def __init__(self, sink: "PrometheusSink", workflow: str) -> None:
        self._stage_seconds = sink._stage_seconds
        self._stage_errors = sink._stage_errors
        self._outcomes = sink._outcomes
        self._dropped = sink._dropped
        self._workflow = workflow
        self._group_seconds = sink._group_seconds
        self._stages: dict[str, tuple[Histogram, Counter]] = {}
        self.gauges: dict[str, Gauge] = _Measured(sink._gauges, workflow)
        self.counters: dict[str, Counter] = {name: c.labels(workflow) for name, c in sink._counters.items()}

    def outcomes(self, kind: str, count: int) -> None:
        """Count outcomes of one kind; there are five."""
        self._outcomes.labels(self._workflow, kind).inc(count)

    def rolled_out(self, seconds: float) -> None:
        """Count what a group took."""
        self._group_seconds.labels(self._workflow).observe(seconds)

    def dropped(self, reason: str) -> None:
        """Count a group that was given up, by the word before the colon."""
        self._dropped.labels(self._workflow, reason.partition(":")[0]).inc()

    def stage(self, name: str) -> tuple[Histogram, Counter]:
        """Return a stage's histogram of seconds and counter of errors."""
        bound = self._stages.get(name)
        if bound is None:
            label = name if len(self._stages) < _MOST_NAMES else "other"
            bound = (
                self._stage_seconds.labels(self._workflow, label),
                self._stage_errors.labels(self._workflow, label),
            )
            if label == name:
                self._stages[name] = bound
        return bound


class PrometheusSink:
    """Counts and gauges of all runs of a kitchen, in a registry of its own.

    Attributes:
        registry: what ``serve_metrics`` serves.
    """

    name = "prometheus"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        one, two = ["workflow"], ["workflow", "stage"]
        self._stage_seconds = Histogram(
            "crucible_stage_seconds", "Seconds a stage took.", two, buckets=_BUCKETS, registry=self.registry
        )
        self._group_seconds = Histogram(
            "crucible_rl_group_seconds",
            "Seconds a trained group of rollouts took.",
            one,
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._stage_errors = Counter(
            "crucible_stage_errors", "Failed attempts of a stage.", two, registry=self.registry
        )
        self._runs = Counter(
            "crucible_runs", "Runs that ended, by how.", ["workflow", "status"], registry=self.registry
        )
        self._outcomes = Counter(
            "crucible_rl_outcomes",
            "Rollouts of trained groups, by outcome.",
            ["workflow", "kind"],
            registry=self.registry,
        )
        self._dropped = Counter(
            "crucible_rl_groups_dropped", "Groups given up, by reason.", ["workflow", "reason"], registry=self.registry
        )
        self._gauges = {
            name: Gauge(f"crucible_{name}", words, one, registry=self.registry) for name, words in _GAUGES.items()
        }
        self._counters = {
            name: Counter(f"crucible_{name}", words, one, registry=self.registry) for name, words in _COUNTERS.items()
        }
        self._open: dict[str, tuple[_Bound, int]] = {}
        self._bound: dict[str, _Bound] = {}

    async def open(self, run: RunInfo) -> None:
        """Count the run as active."""
        if run.run_id in self._open:
            return
        bound = self._bound.get(run.workflow)
        if bound is None:
            label = run.workflow if len(self._bound) < _MOST_NAMES else "other"
            bound = self._bound.setdefault(label, _Bound(self, label))
        self._open[run.run_id] = (bound, 0)
        bound.gauges["runs_active"].inc()

    async def handle(self, records: Sequence[EventRecord]) -> None:
        """Count events."""
        run_id = records[0].run_id
        bound, seen = self._open[run_id]
        for record in records:
            if record.seq > seen:
                count = _COUNT.get(type(record.event))
                if count is not None:
                    count(bound, record.event)
        self._open[run_id] = (bound, records[-1].seq)
        last = records[-1].event
        if isinstance(last, e.WorkflowStop):
            del self._open[run_id]
            bound.gauges["runs_active"].dec()
            self._runs.labels(bound._workflow, last.status).inc()

    async def aclose(self) -> None:
        """Forget the runs that did not end; the counts stay readable."""
        for bound, _ in self._open.values():
            bound.gauges["runs_active"].dec()
        self._open.clear()


_GAUGES = {
    "runs_active": "Runs going on.",
    "training_loss": "Loss of the last optimizer step, mean per trained token.",
    "training_learning_rate": "Learning rate of the last optimizer step.",
    "training_tokens_per_second": "Tokens per second of the last optimizer step.",
    "training_grad_norm": "Gradient norm of the last optimizer step, before clipping.",
    "training_epoch": "Epoch of the last optimizer step.",
    "training_epoch_loss": "Mean loss of the last epoch that ended.",
    "eval_accuracy": "Accuracy of the last evaluation.",
    "eval_f1": "F1 of the last evaluation.",
    "eval_precision": "Precision of the last evaluation.",
    "eval_recall": "Recall of the last evaluation.",
    "eval_samples": "Rows of the last evaluation.",
    "rl_reward_mean": "Mean reward of the last update's rollouts.",
    "rl_policy_loss": "Policy loss of the last update.",
    "rl_entropy": "Entropy of the policy at the last update, nats per token.",
    "rl_clip_fraction": "Share of clipped tokens at the last update.",
    "rl_sampler_mismatch": "Greatest difference of a token's log-probability between sampler and training pass, nats.",
    "rl_queue_depth": "Groups in the queue when the last update ended.",
    "rl_in_flight": "Groups that were being rolled out when the last update ended.",
    "rl_staleness_mean": "Mean age of what was trained, in updates.",
    "rl_staleness_max": "Greatest age of what was trained, in updates.",
    "rl_overlap_efficiency": "Overlap of rollouts and learning, of 1.",
    "rl_learner_idle_share": "Share of the time in which the learner waited for rollouts.",
    "rl_waste": "Share of what was sampled that was given up.",
    "rl_environment_seconds": "Seconds in the environment per rollout, mean of the last update.",
    "rl_sampling_seconds": "Seconds of sampling per rollout, mean of the last update.",
    "rl_evaluated_reward": "Mean reward of the last evaluation of the policy.",
}
_COUNTERS = {
    "training_steps": "Optimizer steps; an update of a policy counts once.",
    "rl_updates": "Updates of a policy.",
    "rl_trajectories": "Episodes that were trained on.",
    "training_checkpoints": "Training states saved.",
    "models_registered": "Model versions registered.",
    "warnings": "Warnings raised.",
}


def _count_step(bound: _Bound, event: e.TrainingStep) -> None:
    gauges = bound.gauges
    bound.counters["training_steps"].inc()
    gauges["training_loss"].set(event.loss)
    gauges["training_learning_rate"].set(event.lr)
    gauges["training_tokens_per_second"].set(event.tokens_per_sec)
    gauges["training_grad_norm"].set(event.grad_norm)
    gauges["training_epoch"].set(event.epoch)


def _count_eval(bound: _Bound, event: e.EvalComplete) -> None:
    for metric in event.measurements:
        bound.gauges[f"eval_{metric}"].set(getattr(event, metric))
    bound.gauges["eval_samples"].set(event.sample_count)


def _count_rollouts(bound: _Bound, event: e.RolloutComplete) -> None:
    bound.counters["rl_trajectories"].inc(event.num_trajectories)
    bound.gauges["rl_reward_mean"].set(event.reward_mean)
    members = max(1, sum(event.outcomes.values()))
    bound.gauges["rl_environment_seconds"].set(event.env_seconds / members)
    bound.gauges["rl_sampling_seconds"].set(event.sampling_seconds / members)
    for seconds in event.seconds:
        bound.rolled_out(seconds)
    for kind, count in event.outcomes.items():
        bound.outcomes(kind, count)


def _count_update(bound: _Bound, event: e.RLStep) -> None:
    bound.counters["rl_updates"].inc()
    for metric in ("policy_loss", "entropy", "clip_fraction", "sampler_mismatch"):
        bound.gauges[f"rl_{metric}"].set(getattr(event, metric))


def _count_pipeline(bound: _Bound, event: e.PipelineMeasured) -> None:
    for metric in event.measurements:
        if metric != "length_bias":
            bound.gauges[f"rl_{metric}"].set(getattr(event, metric))


_COUNT: dict[type[e.Event], Callable[[_Bound, Any], object]] = {
    e.StageStop: lambda bound, event: bound.stage(event.stage)[0].observe(event.duration_s),
    e.StageErrored: lambda bound, event: bound.stage(event.stage)[1].inc(),
    e.TrainingStep: _count_step,
    e.TrainingEpoch: lambda bound, event: bound.gauges["training_epoch_loss"].set(event.avg_loss),
    e.TrainingCheckpoint: lambda bound, _: bound.counters["training_checkpoints"].inc(),
    e.EvalComplete: _count_eval,
    e.RolloutComplete: _count_rollouts,
    e.RLStep: _count_update,
    e.PipelineMeasured: _count_pipeline,
    e.GroupDropped: lambda bound, event: bound.dropped(event.reason),
    e.PolicyEvaluated: lambda bound, event: bound.gauges["rl_evaluated_reward"].set(event.reward_mean),
    e.ModelRegistered: lambda bound, _: bound.counters["models_registered"].inc(),
    e.WarningRaised: lambda bound, _: bound.counters["warnings"].inc(),
}


class _Handler(WSGIRequestHandler):
    timeout = 5.0  # seconds: a client that connects and says nothing does not keep its thread

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape every few seconds is no news."""


class _Server(ThreadingWSGIServer):
    daemon_threads = False  # closing waits for the requests under way


class MetricsServer:
    """A running ``/metrics`` server; ``aclose`` ends it and its thread."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._thread = threading.Thread(
            target=lambda: server.serve_forever(poll_interval=0.1), name="crucible-metrics", daemon=True
        )
        self._thread.start()
        self._closed = False

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        """Where the metrics are."""
        return f"http://{self._server.server_address[0]!s}:{self.port}/metrics"

    async def aclose(self) -> None:
        """Answer the requests under way and stop. Idempotent."""
        if not self._closed:
            self._closed = True
            await run_sync(self._close)

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


async def serve_metrics(registry: CollectorRegistry, port: int, host: str = "127.0.0.1") -> MetricsServer:
    """Serve a registry's metrics over HTTP.

    Args:
        registry: what is served.
        port: where; 0 takes a free one, which ``MetricsServer.port`` tells.
        host: the address to listen on; the default is reachable from this machine only.

    Raises:
        ConfigError: the address is taken or not one of this machine's.
    """

    def start() -> MetricsServer:
        app = make_wsgi_app(registry)
        return MetricsServer(make_server(host, port, app, server_class=_Server, handler_class=_Handler))

    try:
        return await run_sync(start)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error}", hint="choose another metrics_port, or 0 for a free one"
        ) from error
