"""`ptune merge PROMPT... --output FOLDER`: a plain model folder with soft prompts in its vocabulary, for any engine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer


def merge(
    prompts: Annotated[list[Path], typer.Argument(help="Folders of soft prompts; a task has its folder's name.")],
    output: Annotated[Path, typer.Option(help="The folder of the merged model.")],
    model: Annotated[str | None, typer.Option(help="The backbone, where it is not the one the prompts name.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older merged model.")] = False,
) -> None:
    """Merge soft prompts into a plain model folder that transformers, vLLM and other engines serve as it is."""
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.merging.merge import merge_prompts

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that half a folder is taken away
    try:
        merged = merge_prompts(
            prompts, output, backbone=model, overwrite=overwrite, tell=lambda stage: typer.echo(stage, err=True)
        )
    except KeyboardInterrupt:  # typer would end without a word
        typer.echo(f"ptune: stopped before the merged model was whole; nothing was written to {output}", err=True)
        raise typer.Exit(130) from None
    ids = [number for task in merged.tasks.values() for number in task]
    rounding = merged.rounding
    names = list(merged.tasks)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    typer.echo(f"tasks           {', '.join(names[:8])}{more}")
    typer.echo(
        f"virtual tokens  {len(ids)}, ids {min(ids)} to {max(ids)}, of {merged.rows} rows ({merged.appended} new)"
    )
    typer.echo(
        f"not said        probability at most {merged.probability:.1g}, {merged.mean_probability:.1g} on the mean of "
        f"{merged.positions} positions"
    )
    typer.echo(
        f"rounding        {rounding.relative:.1g} of the norm; another next token in {rounding.changed} of "
        f"{rounding.contexts} contexts"
    )
    typer.echo(f"written anew    {', '.join(merged.rewritten)}{'; output head untied' if merged.untied else ''}")
    typer.echo(f"{output}: how to serve it stands in {output / 'README.md'}")
