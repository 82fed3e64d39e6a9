"""`ptune list`: the soft prompts in a folder, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def list_prompts(
    folder: Annotated[Path, typer.Argument(help="Folder of soft prompts; those in folders within it count.")] = Path(
        "prompts"
    ),
) -> None:
    """Show the soft prompts in a folder: task, backbone, score on dev, size of all files but the run's, date."""
    from ptune.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ptune.cli.progress import format_value
    from ptune.soft_prompts.library import read_library

    entries = read_library(folder)
    table = Table("soft prompt", "task", "backbone", "tokens", "dev score", "size", "date", box=None)
    for entry in entries:
        if entry.mistake is not None:
            table.add_row(f"[yellow]{escape(entry.name)}", "[yellow]cannot be read")
            continue
        score = ""
        if entry.metric is not None and entry.value is not None:
            score = f"{entry.metric} {format_value(entry.metric, entry.value)}"
        table.add_row(
            escape(entry.name),
            entry.task,
            escape(entry.backbone),
            str(entry.virtual_tokens),
            score,
            f"{entry.bytes / 1024:.0f} kB",
            (entry.date or "")[:10],
        )
    console = Console(highlight=False)
    console.print(table)
    for entry in entries:
        if entry.mistake is not None:
            console.print(f"[yellow]warning:[/] {escape(entry.mistake)}", soft_wrap=True)
