"""What the benchmarks' tables have in common: means over seeds, and lines of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def of_seeds(cells: Mapping[str, dict[str, Any]], name: str, value: str = "test") -> list[float]:
    """Return a value of the cells `NAME/seed 0`, `NAME/seed 1`, ... that are there."""
    return [cell[value] for cell_name, cell in cells.items() if cell_name.startswith(f"{name}/seed ")]


def percent(values: Sequence[float], missing: str = "") -> str:
    """Return mean ± standard deviation (over n - 1) in percent."""
    if not values:
        return missing
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def markdown_table(lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return lines as a table; the first is its head, the first ``words`` columns hold words and the rest numbers."""
    head, *rest = lines
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rest))
