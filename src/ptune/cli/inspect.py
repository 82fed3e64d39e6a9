"""`ptune inspect PROMPT` says what a soft prompt is; `ptune inspect data CONFIG.yaml` shows what a model will see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptune.errors import ConfigError

_COLOURS = {"virtual": "black on cyan", "answer": "black on green", "special": "magenta", "text": ""}


def inspect(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help='Folder of a soft prompt, or the word "data".')],
    config: Annotated[Path | None, typer.Argument(help='After "data": YAML file of settings.')] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, where it is not the one that is named.")] = None,
    data: Annotated[
        str | None, typer.Option(help='After "data": file, folder or Hub name; goes before the file\'s.')
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="So many examples, or nearest words of a virtual token.")] = 3,
) -> None:
    """Say what a soft prompt is, with the nearest words of each virtual token; or show rendered examples of a config.

    `ptune inspect data CONFIG.yaml` decodes examples back to text: virtual tokens on cyan, what is supervised on green.
    """
    if target == "data":
        _inspect_data(config, context.args, model, data, count)
    elif config is not None or context.args:
        raise ConfigError(
            f'"ptune inspect {target}" takes nothing more; for rendered examples: ptune inspect data CONFIG.yaml'
        )
    else:
        _inspect_prompt(Path(target), model, count)


def _inspect_data(config: Path | None, rest: list[str], model: str | None, data: str | None, count: int) -> None:
    from ptune.config_file import load_config, parse_overrides

    if config is None:
        raise ConfigError("ptune inspect data needs a config file: ptune inspect data CONFIG.yaml")
    overrides = parse_overrides(rest)
    overrides |= {"model.name": model} if model is not None else {}
    overrides |= {"data.train": data, "data.dev": None} if data is not None else {}
    settings = load_config(config, overrides)

    from ptune.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.text import Text

    from ptune.assembly import build_task, read_records, template_for
    from ptune.backbone import Backbone

    backbone = Backbone.load(settings.model)
    template = template_for(settings, backbone)
    task = build_task(settings, template, backbone)
    console = Console(highlight=False, soft_wrap=True)
    train, _ = read_records(settings, template)
    end = settings.task.type == "generation"  # other tasks score their answers without the token that ends a text
    for record in train[:count]:
        text = Text()
        for segment in task.renderer.preview(record, task.answer(record), end=end):
            text.append(segment.text, style=_COLOURS[segment.kind])
        row = task.renderer.row(record, task.answer(record), end=end)
        console.rule(f"[dim]{getattr(record, 'location', '')}", align="left")
        console.print(text)
        if row is not None:
            supervised = sum(label >= 0 for label in row.labels)
            console.print(f"[dim]{len(row.ids)} tokens, {supervised} supervised{', cut' if row.cut else ''}[/]")


def _inspect_prompt(folder: Path, model: str | None, count: int) -> None:
    from ptune.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ptune.backbone import Backbone
    from ptune.errors import BackboneError
    from ptune.nearest_words import nearest_words
    from ptune.soft_prompt import SoftPrompt

    console = Console(highlight=False, soft_wrap=True)
    prompt = SoftPrompt.load(folder)
    facts = Table(show_header=False, box=None)
    for name, value in prompt.describe().items():
        facts.add_row(f"[bold]{escape(str(name))}", escape(str(value)))
    console.print(facts)
    try:
        backbone = Backbone.load(model or prompt.backbone_name)
    except BackboneError as error:
        if model is not None:
            raise
        console.print(f"[dim]nearest words need the backbone: {escape(str(error))}[/]")
        return
    prompt.check(backbone)
    table = Table(
        "virtual token",
        "nearest words (cosine)",
        title="Nearest words. Read little into them: the model reads directions that no word has.",
    )
    for number, neighbours in enumerate(nearest_words(prompt.rows, backbone, count)):
        words = ", ".join(f"{word.text!r} {word.cosine:.2f}" for word in neighbours.by_cosine)
        table.add_row(str(number), escape(words))
    console.print(table)
