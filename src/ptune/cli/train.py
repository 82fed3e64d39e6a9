"""`ptune train CONFIG.yaml`: train a soft prompt as a file of settings says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of settings; see examples/.")],
    model: Annotated[str | None, typer.Option(help='Folder, Hub name or "mini"; goes before the file\'s.')] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or Hub name; goes before the file's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the soft prompt; goes before the file's.")] = None,
    from_prompt: Annotated[
        str | None, typer.Option("--from", help="Start from the virtual tokens of another soft prompt.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that stopped in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in a folder that holds another run.")
    ] = False,
) -> None:
    """Train a soft prompt.

    Any setting of the file can be given by its name, as in `--training.learning_rate 0.003` or, where the last part is
    unique, `--learning-rate 0.003`.
    """
    from ptune.cli.quiet import quiet
    from ptune.config_file import load_config, parse_overrides

    overrides = parse_overrides(context.args)
    if model is not None:
        overrides["model.name"] = model
    if data is not None:
        overrides |= {"data.train": data, "data.dev": None}
    if output is not None:
        overrides["output"] = str(output)
    if from_prompt is not None:
        overrides["prompt.start"] = {"method": "prompt", "prompt": from_prompt}
    settings = load_config(config, overrides)

    quiet()
    from ptune.cli.progress import ProgressReporter
    from ptune.training import Stopped
    from ptune.training import train as run

    try:
        with ProgressReporter() as reporter:
            run(settings, reporter=reporter, resume=resume, overwrite=overwrite)
    except Stopped as stopped:  # typer would end without a word
        typer.echo(f"ptune: {stopped}", err=True)
        raise typer.Exit(130) from None
