"""The command that puts two runs side by side: ``compare``.

Plain facts from the run store: what was asked, what was measured at the end and at every step, what was made. It runs
nothing and judges nothing. Read next: ``crucible_kitchen.cli.reading``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crucible_kitchen.cli.console import answer, answer_json, plain, reporting, table
from crucible_kitchen.cli.options import DEFAULT_HOME, HomeOption, JsonOption
from crucible_kitchen.cli.reading import pages, read

if TYPE_CHECKING:
    from crucible_kitchen.store import RunStore

__all__ = ["compare"]

_TIMES = (
    "tokens_per_sec",
    "duration_s",
    "_s",
    "seconds",
    "overlap_efficiency",
    "learner_idle_share",
    "queue_depth",
    "in_flight",
)
"""Measurements that say how fast the machine was: two equal runs differ in them."""

_ELSEWHERE = ("config", "config_hash")
"""What the manifest repeats."""

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of it.", show_default=False)
]


@reporting
def compare(
    first: RunArgument,
    second: RunArgument,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Put two runs side by side. Config, metrics, artifacts, and their losses step by step."""
    found = [read(home, partial(seen, run_id=run)) for run in (first, second)]
    facts = comparison(found[0], found[1])
    if as_json:
        answer_json(facts)
        return
    for line in facts["verdict"]:
        answer(line)
    for title, rows in (("config", facts["config"]), ("facts", facts["facts"]), ("metrics", facts["metrics"])):
        if rows:
            answer()
            table((title, found[0].run_id, found[1].run_id), [(name, *map(_cell, pair)) for name, pair in rows.items()])
    if facts["artifacts"]:
        answer()
        rows = [(a["kind"], a["name"], *(_cell(s)[:16] for s in a["sha256"])) for a in facts["artifacts"]]
        table(("artifact", "name", found[0].run_id, found[1].run_id), rows)


@dataclass
class Seen:
    """What is compared of one run.

    Attributes:
        steps: by measurement (``training.step.loss``): its value at each step, as the last attempt has it.
    """

    run_id: str
    status: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    manifest: Mapping[str, Any]
    artifacts: Sequence[Mapping[str, Any]]
    steps: dict[str, dict[int, float]] = field(default_factory=dict)


async def seen(store: "RunStore", run_id: str) -> Seen:
    """Read what is compared of a run.

    Raises:
        RunNotFound: there is no such run.
    """
    record = await store.run(run_id)
    artifacts = [asdict(artifact) for artifact in await store.artifacts(record.run_id)]
    result = record.result or {}
    manifest = await store.manifest(record.run_id) or {}
    found = Seen(record.run_id, record.status, record.config, result.get("metrics", {}), manifest, artifacts)
    async for kept in pages(store, record.run_id, 0):
        event = kept.event
        if event.name == "workflow.rolled_back":
            for steps in found.steps.values():  # a later attempt went back: what came after is executed again
                for step in [s for s in steps if s > getattr(event, "step", 0)]:
                    del steps[step]
        elif event.name.endswith(".step"):
            for name in event.measurements:
                if "loss" in name or "reward" in name:
                    found.steps.setdefault(f"{event.name}.{name}", {})[getattr(event, "step", 0)] = getattr(event, name)
    return found


def comparison(a: Seen, b: Seen) -> dict[str, Any]:
    """Return two runs side by side: only what differs of config and facts, all of metrics, artifacts and steps."""
    steps = {name: _course(a.steps.get(name, {}), b.steps.get(name, {})) for name in sorted({*a.steps, *b.steps})}
    artifacts = _artifacts(a, b)
    config = _different(a.config, b.config)
    weights = [row for row in artifacts if row["kind"] == "weights"]
    same_weights = bool(weights) and all(row["same"] for row in weights)
    return {
        "runs": [a.run_id, b.run_id],
        "status": [a.status, b.status],
        "same_config": not config,
        "same_weights": same_weights if weights else None,
        "same_steps": all(course["same"] for course in steps.values()) if steps else None,
        "verdict": _verdict(a, b, config, weights, same_weights=same_weights, steps=steps),
        "config": config,
        "facts": _different(*({k: v for k, v in run.manifest.items() if k not in _ELSEWHERE} for run in (a, b))),
        "metrics": {
            name: [a.metrics.get(name), b.metrics.get(name)]
            for name in sorted({*a.metrics, *b.metrics})
            if not name.startswith(("stage.", "workflow.")) and not name.endswith(_TIMES)
        },
        "steps": steps,
        "artifacts": artifacts,
    }


def _verdict(
    a: Seen,
    b: Seen,
    config: Mapping[str, Any],
    weights: Sequence[Any],
    *,
    same_weights: bool,
    steps: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    lines = [f"{a.run_id} ({a.status}) beside {b.run_id} ({b.status})"]
    lines.append(f"  config  {'the same' if not config else 'differs in ' + ', '.join(config)}")
    if weights:
        lines.append(f"  weights {'the same, bit for bit' if same_weights else 'differ'}")
    for name, course in steps.items():
        counts = course["steps"]
        if course["same"]:
            lines.append(f"  {name} the same at all {counts[0]} steps")
        elif (step := course["differs_at"]) is not None:
            pair = " / ".join(_cell(value) for value in course["values"])
            lines.append(f"  {name} differs from step {step} on: {pair}")
        else:
            lines.append(f"  {name} the same as far as both go: {counts[0]} and {counts[1]} steps")
    return lines


def _course(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, Any]:
    """Compare a measurement over two runs: where it begins to differ, by the last bit."""
    both = sorted(set(a) & set(b))
    at = next((step for step in both if a[step] != b[step] and not (a[step] != a[step] and b[step] != b[step])), None)
    return {
        "same": at is None and set(a) == set(b),
        "differs_at": at,
        "values": None if at is None else [a[at], b[at]],
        "steps": [len(a), len(b)],
    }


def _artifacts(a: Seen, b: Seen) -> list[dict[str, Any]]:
    keys = dict.fromkeys((row["kind"], row["name"]) for row in (*a.artifacts, *b.artifacts))
    rows = []
    for kind, name in keys:
        pair = [
            next((r["sha256"] for r in run.artifacts if (r["kind"], r["name"]) == (kind, name)), None) for run in (a, b)
        ]
        rows.append({"kind": kind, "name": name, "sha256": pair, "same": pair[0] == pair[1]})
    return rows


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(plain(value))
