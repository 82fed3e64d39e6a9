"""`ptune train CONFIG.yaml`: train a soft prompt as a file of settings says."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptune.cli.overrides import check_config_first, run_overrides
from ptune.cli.unused import refuse_unused
from ptune.errors import ConfigError

if TYPE_CHECKING:
    from ptune.config.run import RunConfig
    from ptune.models.backbone import Backbone
    from ptune.soft_prompts.soft_prompt import SoftPrompt


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of settings; see examples/.")],
    model: Annotated[str | None, typer.Option(help='Folder, Hub name or "mini"; goes before the file\'s.')] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or Hub name; goes before the file's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the soft prompt; goes before the file's.")] = None,
    from_prompt: Annotated[
        str | None, typer.Option("--from", help="Start from the virtual tokens of another soft prompt.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Train under so many seeds, each in a folder seed-N of its own.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that stopped in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in a folder that holds another run.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how the batches would be carried out, and train nothing.")
    ] = False,
) -> None:
    """Train a soft prompt, or several in turn on one loaded model: `ptune train A.yaml B.yaml`.

    Any setting of the file can be given by its name, as in `--training.learning_rate 0.003` or, where the last part is
    unique, `--learning-rate 0.003`; docs/configuration.md lists them all.
    """
    from ptune.cli.quiet import quiet
    from ptune.config.file import load_config

    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite begins anew; give one of the two")
    if resume and from_prompt is not None:
        raise ConfigError(
            "--resume and --from do not go together: a run that goes on has its own start; leave one of the two out"
        )
    check_config_first(config, "train")
    if explain:
        why = "--explain trains nothing"
        refuse_unused(why, resume=resume, overwrite=overwrite, seeds=seeds if seeds > 1 else None)
    files = [config]
    while context.args and not context.args[0].startswith("--"):
        files.append(Path(context.args.pop(0)))
    overrides = run_overrides(context.args, model=model, data=data, output=output)
    if from_prompt is not None:
        if given := [name for name in overrides if name.startswith("prompt.start.")]:
            raise ConfigError(
                f"--from and --{given[0]} both say what the virtual tokens start from; give one of the two"
            )
        overrides["prompt.start"] = {"method": "prompt", "prompt": from_prompt}
    settings = [load_config(file, overrides) for file in files]

    quiet()
    if explain:
        from ptune.cli.explain import explain_run

        for each in settings:
            explain_run(each)
        return
    from ptune.errors import Stopped

    try:
        if seeds > 1:
            if len(settings) > 1:
                raise ConfigError("--seeds goes with one file of settings; give each file a command of its own")
            _train_seeds(settings[0], seeds, resume=resume, overwrite=overwrite)
        elif len(settings) > 1:
            _train_in_turn(settings, resume=resume, overwrite=overwrite)
        else:
            _train(settings[0], resume=resume, overwrite=overwrite)
    except Stopped as stopped:  # typer would end without a word
        typer.echo(f"ptune: {stopped}", err=True)
        raise typer.Exit(130) from None


def _train(config: RunConfig, **options: Any) -> SoftPrompt:
    from ptune.cli.progress import ProgressReporter
    from ptune.training.train import train as run

    with ProgressReporter() as reporter:
        return run(config, reporter=reporter, **options)


def _train_in_turn(configs: list[RunConfig], *, resume: bool, overwrite: bool) -> list[SoftPrompt]:
    from rich.console import Console
    from rich.markup import escape

    from ptune.training.series import check_series, in_turn, may_resume

    check_series(configs, resume=resume, overwrite=overwrite)
    numbers = count(1)

    def run(config: RunConfig, backbone: Backbone) -> SoftPrompt:
        Console().rule(escape(f"{next(numbers)} of {len(configs)}: {config.output}"), align="left")
        going_on = may_resume(config, resume)
        return _train(config, backbone=backbone, resume=going_on, overwrite=overwrite)

    return in_turn(configs, run)


def _train_seeds(config: RunConfig, count: int, *, resume: bool, overwrite: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ptune.cli.progress import format_value
    from ptune.training.series import spread, under_seeds

    configs = under_seeds(config, count)
    prompts = _train_in_turn(configs, resume=resume, overwrite=overwrite)
    metric = prompts[0].summary["metric"]
    table = Table("seed", "before", "after", "best step", "soft prompt", title=f"{metric} on dev over {count} seeds")
    for one, prompt in zip(configs, prompts, strict=True):
        before, after = (format_value(metric, prompt.summary[when][metric]) for when in ("before", "after"))
        table.add_row(str(one.training.seed), before, after, str(prompt.summary["best_step"]), escape(str(one.output)))
    mean, deviation = (format_value(metric, value) for value in spread(prompts, metric))
    table.add_section()
    table.add_row("mean", "", f"{mean} ± {deviation}", "", "")
    Console().print(table)
