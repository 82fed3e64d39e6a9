"""What the comparisons with published figures have in common: their options, and how a result is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptune.errors import PtuneError
from ptune.files import write_json


def options(documentation: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a command's options; those without a default follow what was published."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0] if documentation else None)
    parser.add_argument("--model", help="folder or Hub name")
    parser.add_argument("--data", type=Path, help="folder of the data sets' folders; the Hub where absent")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--virtual-tokens", type=int)
    parser.add_argument("--dtype", help="of the frozen weights")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, help="folder for result.json and the soft prompts")
    parser.set_defaults(**defaults)
    return parser


def tell(
    name: str,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    arguments: argparse.Namespace,
) -> int:
    """Run a comparison, write its result where asked and print its table; 2 for a user's mistake, 130 when stopped."""
    try:
        result = run(arguments)
        if arguments.output is not None:
            write_json(arguments.output / "result.json", result)
    except PtuneError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # SIGTERM too, while a prompt is trained
        print(f"{name}: stopped; no result was written", file=sys.stderr)
        return 130
    print(table(result))
    return 0
