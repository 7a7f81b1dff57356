"""One Markdown table on standard output; what every benchmark prints. It knows nothing of what is measured."""

import os
import platform
from collections.abc import Sequence

__all__ = ["machine", "print_table"]


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers stand to the right, with three digits that mean something."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    widths = [max(3, *(len(row[i]) for row in [list(head), *cells])) for i in range(len(head))]
    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    print(f"### {title}\n")
    for row in [list(head), rule, *cells]:
        aligned = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        print(f"| {' | '.join(aligned)} |")
    print()


def machine() -> str:
    """Return the kind of machine in a few words, without its name."""
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
