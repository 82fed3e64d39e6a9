"""Results of a benchmark in one JSON file, each written as soon as it is there, so that a stopped benchmark goes on.

Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptune.errors import ConfigError, PtuneError
from ptune.files import read_json, write_json


class Cells:
    """The stored results: each is computed once and written at once.

    Attributes:
        computed: how many were computed in this run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.computed = path, 0
        self.content: dict[str, Any] = {"tasks": {}}
        if path.exists():
            self.content = read_json(path, ConfigError)

    def begin(self, task: str, settings: Mapping[str, Any]) -> None:
        """Note a task's settings.

        Raises:
            ConfigError: its stored cells are of other settings.
        """
        settings = json.loads(json.dumps(settings))
        entry = self.content["tasks"].setdefault(task, {"settings": settings, "cells": {}})
        stored = entry["settings"] if entry["cells"] else settings
        for name, value in settings.items():
            if stored.get(name) != value:
                raise ConfigError(
                    f'"{self.path}" holds results of {task} with {name} {stored.get(name)!s:.80}, and now it is '
                    f"{value!s:.80}; name another --output, or remove that file"
                )
        entry["settings"] = settings

    def cells(self, task: str) -> dict[str, dict[str, Any]]:
        """Return a task's results by name."""
        return self.content["tasks"].get(task, {}).get("cells", {})

    def get(self, task: str, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a result, computed and stored first if it is missing."""
        cells = self.cells(task)
        if name not in cells:
            begun = time.perf_counter()
            result = compute()
            self.put(task, name, result | {"wall_seconds": round(time.perf_counter() - begun, 2)})
        return cells[name]

    def put(self, task: str, name: str, result: dict[str, Any]) -> None:
        """Store a result."""
        self.cells(task)[name] = result
        self.computed += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)
        print(f"{task} {name}: {json.dumps(result)[:200]}", file=sys.stderr, flush=True)


def parser_of(document: str | None, output: Path) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark with stored results takes: data, file of results, whether to compute.

    Args:
        document: the script's docstring; its first line says what it is.
        output: the file of results where none is named.
    """
    parser = argparse.ArgumentParser(description=(document or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder per task")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--markdown", action="store_true", help="compute nothing, print what is stored")
    return parser


def tell(output: Path, compute: Callable[[Cells], None] | None, markdown: Callable[[Mapping[str, Any]], str]) -> int:
    """Compute what is missing, print the tables of what is stored, and return the exit status.

    Args:
        output: the file of results.
        compute: fills them; None to compute nothing.
        markdown: of all that is stored.
    """
    try:
        cells = Cells(output)
        if compute is not None:
            compute(cells)
    except PtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(markdown(cells.content))
    return 0
