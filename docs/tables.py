"""Writes the measured tables into their pages, from what benchmarks/results holds: `python docs/tables.py`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. A test holds the pages up to date.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "quality.md", ROOT / "docs" / "recipes.md")
SCRIPTS = ("tasks_table", "spot", "defaults", "place")
"""Each in benchmarks/, with a `markdown` of the results of its own name."""


def table(name: str) -> str:
    """Return a script's tables, of what is stored; nothing where nothing is."""
    results = RESULTS / f"{name}.json"
    if not results.exists():
        return ""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        script = importlib.import_module(name)
        cells = importlib.import_module("cells")
    finally:
        sys.path.pop(0)
    return script.markdown(cells.Cells(results).content)


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
