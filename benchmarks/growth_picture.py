"""Panels of lines over logarithmic axes as one SVG file, readable on a light page and on a dark one.

Knows numbers and names, and nothing of what was measured. The same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 290, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 34, 44
COLUMNS = 3
COLOURS = {"PEFT": "peer", "in front": "front", "behind": "behind"}
STYLE = """
text { font: 12px Helvetica, Arial, sans-serif; fill: #1f2933 }
.title { font-weight: bold }
.page { fill: #ffffff }
.grid { stroke: #d5dbe1; stroke-width: 1 }
.line { fill: none; stroke-width: 2 }
.peer { stroke: #52606d; color: #52606d }
.front { stroke: #0e7490; color: #0e7490 }
.behind { stroke: #c2410c; color: #c2410c }
.dot { fill: currentColor; stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #e4e7eb }
.page { fill: #161b22 }
.grid { stroke: #3a434e }
.peer { stroke: #b8c2cc; color: #b8c2cc }
.front { stroke: #22b8cf; color: #22b8cf }
.behind { stroke: #fb923c; color: #fb923c }
}
"""


@dataclass(frozen=True)
class Point:
    """Seconds at one place of an axis: the median, the least and the greatest."""

    at: float
    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Panel:
    """Lines over one axis; the name of a line is a case and a dtype, with a comma between."""

    title: str
    lines: Mapping[str, Sequence[Point]]


def picture(panels: Sequence[Panel]) -> str:
    """Return the panels in rows of three, what the lines mean behind the last of them."""
    rows = -(-(len(panels) + 1) // COLUMNS)
    columns = min(COLUMNS, len(panels) + 1)
    size = f"{columns * WIDTH} {rows * HEIGHT}"
    pieces = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">',
        "<title>Seconds of an optimizer step as its size grows, of PEFT and of ptune</title>",
        f"<style>{STYLE}</style>",
        '<rect class="page" width="100%" height="100%" rx="10"/>',
    ]
    for number, panel in enumerate(panels):
        pieces += [_placed(number), *_panel(panel), "</g>"]
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    pieces += [_placed(len(panels)), *_legend(names), "</g>", "</svg>"]
    return "\n".join(pieces) + "\n"


def _placed(number: int) -> str:
    return f'<g transform="translate({number % COLUMNS * WIDTH} {number // COLUMNS * HEIGHT})">'


def _panel(panel: Panel) -> list[str]:
    """Draw a panel: grid and numbers, lines, and the range of the rounds at each point."""
    points = [point for line in panel.lines.values() for point in line]
    places = sorted({point.at for point in points})
    low, high = min(point.least for point in points), max(point.greatest for point in points)
    marks = _marks(low, high)
    x = _scale(places[0], places[-1], LEFT + 8, WIDTH - RIGHT - 8)
    y = _scale(min(low, marks[0]), max(high, marks[-1]), HEIGHT - BOTTOM, TOP)
    pieces = [f'<text class="title" x="{LEFT}" y="20">{escape(panel.title)}</text>']
    for mark in marks:
        pieces.append(f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>')
        pieces.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{_number(mark)} s</text>')
    for place in places:
        pieces.append(
            f'<text x="{x(place):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(place)}</text>'
        )
    for name, line in panel.lines.items():
        look = COLOURS[name]
        path = "L".join(f"{x(point.at):.1f} {y(point.median):.1f}" for point in line)
        pieces.append(f'<path class="line {look}" d="M{path}"/>')
        for point in line:
            at = f"{x(point.at):.1f}"
            spread = f"M{at} {y(point.least):.1f}V{y(point.greatest):.1f}"
            pieces.append(f'<path class="{look}" d="{spread}"/>')
            pieces.append(f'<g class="{look}"><circle class="dot" cx="{at}" cy="{y(point.median):.1f}" r="3"/></g>')
    return pieces


def _legend(names: Sequence[str]) -> list[str]:
    pieces = [f'<text class="title" x="{LEFT}" y="20">seconds a step</text>']
    for number, name in enumerate(names):
        height = TOP + 14 + 24 * number
        pieces.append(f'<path class="line {COLOURS[name]}" d="M{LEFT} {height}h36"/>')
        pieces.append(
            f'<text x="{LEFT + 46}" y="{height + 4}">{escape(name if name == "PEFT" else f"ptune, {name}")}</text>'
        )
    return pieces


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return what sets values on a logarithmic axis from ``start`` to ``end``."""
    width = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / width


def _marks(low: float, high: float) -> list[float]:
    """Return round numbers from the last at or below ``low`` to the first at or above ``high``, eight at most."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        numbers = [step * 10.0**exponent for exponent in exponents for step in steps]
        first = max(number for number in numbers if number <= low)
        last = min(number for number in numbers if number >= high)
        marks = [number for number in numbers if first <= number <= last]
        if len(marks) <= 8:
            break
    return marks


def _number(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.4f}".rstrip("0")
