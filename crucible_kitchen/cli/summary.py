"""What a run gave, for people and as JSON, read from the run store.

It knows no command and no adapter. Read next: ``crucible_kitchen.cli.reading``.
"""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crucible_kitchen.cli.options import DEFAULT_HOME

if TYPE_CHECKING:
    from crucible_kitchen.store import RunRecord, RunStore

__all__ = ["clock", "run_facts", "run_row", "summary"]


async def run_facts(store: "RunStore", run_id: str) -> dict[str, Any]:
    """Return everything the store knows of a run: what ``run --json`` prints, and what it was.

    Raises:
        RunNotFound: there is no such run.
    """
    record = await store.run(run_id)
    result = record.result or {}
    return {
        "run_id": record.run_id,
        "workflow": record.workflow,
        "status": record.status,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "state": result.get("state", {}),
        "metrics": result.get("metrics", {}),
        "artifacts": [asdict(artifact) for artifact in await store.artifacts(record.run_id)],
        "duration_s": result.get("duration_s"),
        "error": record.error,
        "config": record.config,
        "manifest": await store.manifest(record.run_id),
    }


def run_row(record: "RunRecord") -> dict[str, Any]:
    """Return a run as one row of the list of runs."""
    state = (record.result or {}).get("state", {})
    model = state.get("registered_model")
    return {
        "run_id": record.run_id,
        "workflow": record.workflow,
        "status": record.status,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "duration_s": (record.result or {}).get("duration_s"),
        "accuracy": (state.get("eval_results") or {}).get("accuracy"),
        "model": f"{model['name']}:{model['version']}" if model else None,
        "error": record.error,
    }


def summary(facts: Mapping[str, Any], home: Path) -> list[str]:
    """Return what a person wants to know at the end of a run, one fact a line."""
    run_id = facts["run_id"]
    took = facts.get("duration_s")
    lines = [f"run {run_id} {facts['status']}" + (f" after {took:.1f} s" if took is not None else "")]
    state = facts.get("state") or {}
    if results := state.get("eval_results"):
        before = state.get("eval_before")
        if "accuracy" in results:
            lines.append(_fact("accuracy", accuracy(results, before)))
        elif "reward_mean" in results:
            lines.append(_fact("reward", reward(results, before)))
    if model := state.get("registered_model"):
        lines.append(_fact("model", f"{model['name']}:{model['version']}"))
    directory = home / "runs" / str(run_id)
    stored = any(artifact["kind"] == "weights" for artifact in facts.get("artifacts") or ())  # whole, not half written
    lines += [
        _fact(what, str(directory / name))
        for what, name in (("weights", "export"), ("report", "report.md"))
        if (directory / name).exists() and (what != "weights" or stored)
    ]
    where = "" if home == DEFAULT_HOME else f" --home {home}"
    return [*lines, _fact("look again", f"crucible-kitchen show {run_id}{where}")]


def _fact(what: str, text: str) -> str:
    return f"  {what:<11} {text}"


def accuracy(results: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Return an accuracy with what it was before training, its interval and its number of rows."""
    text = f"{results['accuracy']:.3f}"
    if before:
        text = f"{before['accuracy']:.3f} before, {text} after"
    interval = (results.get("intervals") or {}).get("accuracy")
    spread = f"95% interval {interval[0]:.3f} to {interval[1]:.3f}, " if interval else ""
    made_up = "; synthetic: measured on a noop adapter" if results.get("synthetic") else ""
    return f"{text} ({spread}{results['n']} held-out rows{made_up})"


def reward(results: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Return a policy's mean reward with what it was before training, and its number of episodes."""
    text = f"{results['reward_mean']:.3f}"
    if before:
        text = f"{before['reward_mean']:.3f} before, {text} after"
    where = "held-out problems" if results.get("held_out") else "episodes"
    made_up = "; synthetic: measured on a noop adapter" if results.get("synthetic") else ""
    return f"{text} ({results['episodes']} {where}{made_up})"


def clock(seconds: float | None) -> str:
    """Return a time as people of this place read it."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
