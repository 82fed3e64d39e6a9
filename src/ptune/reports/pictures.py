"""Curves and the calibration diagram as SVG that stands inside a page: its text is text, its ink the page's.

Knows numbers and names, and nothing of runs or of HTML around it. matplotlib draws, an optional package.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ptune.errors import MissingExtraError
from ptune.tasks.calibration import Bin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

_INK = "#010203"
_COLOURS = ("#010204", "#010205", "#010206", "#010207")
_SETTINGS = {
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
Points = Sequence[tuple[float, float]]


def check_matplotlib() -> None:
    """See that pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("a report's pictures need matplotlib: pip install ptune[report]") from error


def curves(series: Mapping[str, Points], value: str, marked: float | None = None) -> str:
    """Return lines over steps.

    Args:
        series: name -> steps and values; what is not a number is left out.
        value: what the values are called.
        marked: the step whose rows were kept.
    """
    with _picture(f"curves {value}", 6.4, 3.0) as (axes, drawn):
        for number, (name, points) in enumerate(series.items()):
            finite = [(step, y) for step, y in points if math.isfinite(y)]
            mark = "o" if len(finite) < 30 else ""
            steps, values = [step for step, _ in finite], [y for _, y in finite]
            axes.plot(steps, values, label=name, color=_COLOURS[number % 4], marker=mark, markersize=3.5)
        if marked is not None:
            axes.axvline(marked, color=_INK, linewidth=0.8, linestyle=":", label="kept")
        axes.set_xlabel("step")
        axes.set_ylabel(value)
        axes.legend()
    return drawn[0]


def reliability_diagram(before: Sequence[Bin], after: Sequence[Bin] | None) -> str:
    """Return how right predictions of each confidence are, without the temperature and with it where there is one."""
    with _picture("reliability", 3.9, 3.9) as (axes, drawn):
        from matplotlib.collections import PathCollection

        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="as sure as right")
        most = max(one.records for one in (*before, *(after or ())))
        for name, bins, colour in (("as they are", before, 1), ("with the temperature", after, 0)):
            if bins:
                x, y = [one.confidence for one in bins], [one.accuracy for one in bins]
                sizes = [12 + 130 * one.records / most for one in bins]
                axes.plot(x, y, color=_COLOURS[colour], linewidth=1)
                axes.scatter(x, y, sizes, color=_COLOURS[colour], label=name if after else None, linewidths=0)
        axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.03), xlabel="confidence", ylabel="share that is right")
        axes.set_aspect("equal")
        handles, names = axes.get_legend_handles_labels()
        if after:
            for handle in axes.legend(handles, names, loc="upper left").legend_handles[1:]:
                if isinstance(handle, PathCollection):
                    handle.set_sizes([40])
    return drawn[0]


@contextmanager
def _picture(name: str, width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Give axes to draw on, and a list that holds the SVG afterwards."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    drawn: list[str] = []
    # Ids within a picture are drawn from the salt: two pictures of one page must not share them.
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # measured without a font for it; the page has one
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(), drawn
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    drawn.append(_inline(written.getvalue()))


def _inline(svg: str) -> str:
    """Return an SVG file as an element of a page: nothing before it, no metadata, colours those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    for number, colour in enumerate(_COLOURS):
        svg = svg.replace(colour, f"var(--line{number})")
    # Fonts are the page's own; matplotlib names those that it measured with.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return svg.strip()
