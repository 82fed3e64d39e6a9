"""Writes the measured tables into their pages, from what benchmarks/results holds, and draws the picture of growth.

    python docs/tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. A test holds the pages up to date.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("quality", "recipes", "performance", "measured", "search"))
PICTURE = ROOT / "docs" / "growth.svg"
SCRIPTS = ("full_runs", "tasks_table", "spot", "defaults", "place", "precision", "growth", "search_quality")
"""Each in benchmarks/, with a `markdown` of the results of its own name."""


def table(name: str) -> str:
    """Return a script's tables, of what is stored; nothing where nothing is."""
    results = RESULTS / f"{name}.json"
    return _script(name).markdown(_script("cells").Cells(results).content) if results.exists() else ""


def picture() -> str:
    """Return the picture of how the cost of a step grows, of what is stored; nothing where nothing is."""
    results = RESULTS / "growth.json"
    if not results.exists():
        return ""
    panels = _script("growth").panels(_script("cells").Cells(results).content)
    return _script("growth_picture").picture(panels) if panels else ""


def _script(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def filled(text: str) -> str:
    """Return a page's text with its tables as they are stored."""
    for name in SCRIPTS:
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.DOTALL)
        if between.search(text):
            replacement = table(name)
            text = between.sub(lambda found: f"{found[1]}{replacement}\n{found[2]}", text)  # noqa: B023
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    if drawn := picture():
        PICTURE.write_text(drawn, encoding="utf-8")
