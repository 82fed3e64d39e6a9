"""`ptune cache`: what is kept on disk between runs, and away with it."""

from __future__ import annotations

from typing import Annotated

import typer

from ptune.errors import ConfigError


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what lies there; runs compute it anew.")] = False,
    backbone: Annotated[
        str | None, typer.Option(help="With --clear: of this backbone only, named as the table names it.")
    ] = None,
) -> None:
    """Show the kept contexts of each backbone: how many, their size, when they were used last.

    They are written by runs with `training.context_cache_disk`; the folder is PTUNE_CACHE, or else ptune in the
    user's cache folder.
    """
    from datetime import datetime

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ptune.plans.context_store import cache_folder, clear_contexts, stored_contexts

    console = Console(highlight=False, soft_wrap=True)
    if backbone is not None and not clear:
        raise ConfigError("--backbone says what to clear, and --clear is missing; add it, or leave --backbone out")
    if clear:
        removed = clear_contexts(backbone)
        count, size = sum(entry.contexts for entry in removed), sum(entry.bytes for entry in removed)
        console.print(f"{count:,} contexts removed, {size / 1e6:,.1f} MB")
        return
    entries = stored_contexts()
    if not entries:
        console.print(f"nothing is kept in {escape(str(cache_folder()))} (training.context_cache_disk)")
        return
    table = Table("backbone", "dtype", "contexts", "MB", "last use", box=None)
    for entry in entries:
        used = datetime.fromtimestamp(entry.last_use).isoformat(" ", "minutes") if entry.last_use else "-"
        megabytes = f"{entry.bytes / 1e6:,.1f}"
        table.add_row(escape(entry.backbone), entry.dtype, f"{entry.contexts:,}", megabytes, used)
    console.print(table)
    console.print(escape(str(cache_folder())), style="dim")
