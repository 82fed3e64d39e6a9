"""`ptune search CONFIG.yaml`: train many candidates at once, and keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptune.cli.overrides import check_config_first, run_overrides
from ptune.cli.unused import refuse_unused
from ptune.errors import ConfigError


def search(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of settings, with a section `search` or none.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(help="A setting and its values, as in `learning_rate=0.002,0.01`; may come several times."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=2, help="Draw so many candidates of the grid, by training.seed.")
    ] = None,
    halvings: Annotated[
        int | None, typer.Option(min=0, help="How often the better half goes on alone; 0 for never. Default: 2.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Most candidates that are accepted. Default: 32.")] = None,
    model: Annotated[str | None, typer.Option(help='Folder, Hub name or "mini"; goes before the file\'s.')] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or Hub name; goes before the file's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the best soft prompt; goes before the file's.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in a folder that holds another run.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how the batches would be carried out, and train nothing.")
    ] = False,
) -> None:
    """Train candidates together on one loaded model, drop the worse half twice, keep the best soft prompt.

    Every combination of the varied settings is a candidate. Any setting of the file can be given by its name, as in
    `--training.max_steps 300`. docs/search.md has the rest.
    """
    from ptune.cli.quiet import quiet
    from ptune.config.candidates import load_search, parse_vary

    check_config_first(config, "search")
    overrides = run_overrides(context.args, model=model, data=data, output=output)
    if explain:
        refuse_unused("--explain trains nothing", overwrite=overwrite)
    varied = parse_vary(vary or [])
    if twice := [name for name in varied if name in overrides]:
        raise ConfigError(f"{twice[0]} is given by --vary and as --{twice[0]}; give one of the two")
    given: dict[str, Any] = {"sample": sample, "halvings": halvings, "limit": limit}
    given = {name: value for name, value in given.items() if value is not None}
    run, settings = load_search(config, overrides, given | {"vary": varied})

    quiet()
    if explain:
        from ptune.cli.explain import explain_search

        explain_search(run, settings)
        return
    from rich.markup import escape

    from ptune.cli.search_progress import SearchProgress
    from ptune.errors import Stopped
    from ptune.training.run_folder import CANDIDATES
    from ptune.training.search import search as search_for

    try:
        with SearchProgress() as reporter:
            search_for(run, settings, reporter=reporter, overwrite=overwrite)
            table = escape(str(run.output / "run" / CANDIDATES))
            reporter.console.print(f"saved [bold]{escape(str(run.output))}[/]; all candidates: {table}")
    except Stopped as stopped:  # typer would end without a word
        typer.echo(f"ptune: {stopped}", err=True)
        raise typer.Exit(130) from None
