"""The curves of a reinforcement run, kept update by update, and its report with their plot.

The plot is plain SVG: it needs no package and opens in any browser. Knows no engine. Read next:
``crucible_kitchen.workflows.reinforcement``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from crucible_kitchen.ports import BlobStore
from crucible_kitchen.rl.batch import Batch
from crucible_kitchen.rl.trajectories import TrajectoryGroup
from crucible_kitchen.stages.rollout import EnvironmentPool
from crucible_kitchen.types import BlobRef
from crucible_kitchen.workers import run_sync
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage

__all__ = ["Curves", "keep_curves", "svg", "write_policy_report"]

NAMES = ("reward", "loss", "KL", "clip fraction", "staleness")
MOST = 2000
"""So many points are kept; then every second one is left out."""
WIDTH, HEIGHT, MARGIN = 640, 150, 44


@dataclass(frozen=True, slots=True)
class Curves:
    """One point per update.

    Attributes:
        updates: the update of each point, from 1.
        points: per point the numbers of ``NAMES``.
        stride: of how many updates one is kept.
    """

    updates: tuple[int, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    stride: int = 1

    def with_point(self, update: int, point: tuple[float, ...]) -> "Curves":
        """Return the curves with one more point, thinned if they have become too many."""
        if update % self.stride:
            return self
        updates, points, stride = (*self.updates, update), (*self.points, point), self.stride
        if len(points) > MOST:
            kept = [i for i, u in enumerate(updates) if u % (2 * stride) == 0]
            updates, points = tuple(updates[i] for i in kept), tuple(points[i] for i in kept)
            stride *= 2
        return Curves(updates, points, stride)


@stage(writes="curves")
async def keep_curves(
    rollouts: Batch[TrajectoryGroup],
    rollout_metrics: dict[str, Any],
    ppo_metrics: dict[str, float],
    curves: Curves | None = None,
) -> Curves:
    """Keep what an update measured, for the report's plot."""
    ages = rollouts.rollouts.measured.staleness
    staleness = sum(age * n for age, n in ages.items()) / max(1, sum(ages.values()))
    point = (
        rollout_metrics["reward_mean"],
        ppo_metrics["loss"],
        ppo_metrics["kl_divergence"],
        ppo_metrics["clip_fraction"],
        staleness,
    )
    return (curves or Curves()).with_point(rollouts.update + 1, point)


@stage()
async def write_policy_report(
    data: EnvironmentPool,
    run: Run,
    curves: Curves | None = None,
    eval_results: dict[str, Any] | None = None,
    blob_store: BlobStore | None = None,
) -> None:
    """Write the run's plot and its numbers into the run's directory and the blob store."""
    documents = {"report.svg": svg(curves or Curves(), data.name), "report.md": _markdown(data, run, eval_results)}
    for name, text in documents.items():
        path = run.directory / name
        await run_sync(Path.write_text, path, text, encoding="utf-8")
        if blob_store is not None:
            stored: BlobRef = await blob_store.put_file(path, kind="report", name=name)
            run.add_artifact(stored)


def _markdown(data: EnvironmentPool, run: Run, results: dict[str, Any] | None) -> str:
    lines = [f"# {run.recipe}: {data.name}", "", "![curves](report.svg)", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in (results or {}).items() if not isinstance(value, dict)]
    ledger = data.rollouts.ledger.to_json()
    lines += [f"| {name} groups | {ledger[name]} |" for name in ("drawn", "trained", "requeued")]
    lines += [f"| dropped groups: {reason} | {count} |" for reason, count in ledger["dropped"].items()]
    return "\n".join(lines) + "\n"


def svg(curves: Curves, title: str) -> str:
    """Return a plot of the curves, one below the other, as SVG."""
    height = HEIGHT * len(NAMES) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11" fill="#333"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for place, name in enumerate(NAMES):
        values = [point[place] for point in curves.points]
        parts += _chart(name, curves.updates, values, top=30 + place * HEIGHT)
    return "\n".join([*parts, "</svg>\n"])


def _chart(name: str, xs: Sequence[int], ys: Sequence[float], *, top: int) -> list[str]:
    bottom, right = top + HEIGHT - 34, WIDTH - 16
    frame = f'<path d="M{MARGIN} {top}V{bottom}H{right}" fill="none" stroke="#999"/>'
    label = f'<text x="{MARGIN + 6}" y="{top + 12}">{escape(name)}</text>'
    if not ys:
        return [frame, label]
    low, high = min(ys), max(ys)
    wide, tall = max(xs[-1] - xs[0], 1), (high - low) or 1.0
    places = (
        f"{MARGIN + (x - xs[0]) / wide * (right - MARGIN):.1f},{bottom - (y - low) / tall * (bottom - top - 6):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    return [
        frame,
        label,
        f'<polyline points="{" ".join(places)}" fill="none" stroke="#1f6fb2" stroke-width="1.4"/>',
        f'<text x="{MARGIN - 4}" y="{top + 8}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{MARGIN - 4}" y="{bottom}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{MARGIN}" y="{bottom + 14}">{xs[0]}</text>',
        f'<text x="{right}" y="{bottom + 14}" text-anchor="end">{xs[-1]} updates</text>',
    ]
