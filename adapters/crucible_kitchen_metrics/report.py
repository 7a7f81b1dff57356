"""Evaluation reports as documents: Markdown, JSON, HTML. Whatever a model or dataset wrote is escaped.

It knows a report and no model. Read next: ``crucible_kitchen_metrics.evaluator``.
"""

import html
import json
from collections.abc import Iterator
from dataclasses import asdict

from crucible_kitchen.ports import EvalReport

__all__ = ["render_html", "render_json", "render_markdown"]

_SHORT = ("accuracy", "exact_match", "precision", "recall", "f1")
_SYNTHETIC = "These numbers are synthetic: they measure no model."

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { position: relative; height: .8rem; min-width: 10rem; background: #eee }
.interval { position: absolute; top: 0; bottom: 0; background: #9cc3e6 }
.value { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; background: #1b4f7a }
.warning { padding: .5rem .8rem; background: #fff3cd }
code { overflow-wrap: anywhere }
"""


def render_json(report: EvalReport) -> str:
    """Return a report as JSON, everything in it."""
    return json.dumps(asdict(report), indent=2, sort_keys=True)


def render_markdown(report: EvalReport) -> str:
    """Return a report as Markdown with one table."""
    lines = ["# Evaluation", "", _heading(report), ""]
    if report.synthetic:
        lines += [f"**{_SYNTHETIC}**", ""]
    lines += ["| metric | value | 95 % interval |", "|---|---:|---:|"]
    for name, value, interval in _rows(report):
        lines.append(f"| {_markdown(name)} | {value:.4f} | {_interval(interval)} |")
    if report.mistakes:
        lines += ["", f"Wrongly answered (at most 20): {', '.join(_markdown(key) for key in report.mistakes)}"]
    return "\n".join(lines) + "\n"


def render_html(report: EvalReport) -> str:
    """Return a report as one HTML page that needs nothing else: no script, no file, no network."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td class=number>{value:.4f}</td><td class=number>{_interval(interval)}</td>"
        f"<td>{_bar(value, interval)}</td></tr>\n"
        for name, value, interval in _rows(report)
    )
    warning = f"<p class=warning>{_SYNTHETIC}</p>\n" if report.synthetic else ""
    mistakes = ", ".join(f"<code>{html.escape(key)}</code>" for key in report.mistakes)
    wrong = f"<p>Wrongly answered (at most 20): {mistakes}</p>\n" if mistakes else ""
    return (
        "<!doctype html>\n<html lang=en>\n<head><meta charset=utf-8><title>Evaluation</title>\n"
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>Evaluation</h1>\n<p>{html.escape(_heading(report))}</p>\n"
        f"{warning}<table>\n<tr><th>metric</th><th>value</th><th>95 % interval</th><th></th></tr>\n{rows}</table>\n"
        f"{wrong}</body>\n</html>\n"
    )


def _heading(report: EvalReport) -> str:
    averages = f"; precision, recall and f1 are {report.average} averages" if report.average else ""
    return f"{report.n} held-out examples{averages}."


def _rows(report: EvalReport) -> Iterator[tuple[str, float, tuple[float, float] | None]]:
    """Give the metrics, those people ask for first."""
    names = [name for name in _SHORT if name in report.metrics]
    names += sorted(name for name in report.metrics if name not in _SHORT)
    for name in names:
        yield name, report.metrics[name], report.intervals.get(name)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _bar(value: float, interval: tuple[float, float] | None) -> str:
    low, high = interval or (value, value)
    return (
        f'<div class=bar><div class=interval style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></div>'
        f'<div class=value style="left:{100 * value:.2f}%"></div></div>'
    )


def _markdown(text: str) -> str:
    """Escape text for a table's cell: as HTML, because Markdown passes it through, and Markdown's own signs."""
    text = html.escape(" ".join(text.split()))
    return "".join(f"\\{c}" if c in "\\`*_[]|#!" else c for c in text)
