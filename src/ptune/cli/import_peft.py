"""`ptune import ADAPTER`: make a soft prompt of an adapter that PEFT has saved of P-tuning, prompt or prefix tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_peft(
    adapter: Annotated[Path, typer.Argument(help="Folder that PEFT's save_pretrained has written.")],
    config: Annotated[
        Path, typer.Option(help="YAML file with the template and task that the adapter was trained for.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the soft prompt.")],
    model: Annotated[str | None, typer.Option(help="The backbone; as the config says where absent.")] = None,
) -> None:
    """Make a soft prompt of an adapter that PEFT has trained by P-tuning, prompt tuning or prefix tuning."""
    from ptune.config.file import load_config

    settings = load_config(config, {"model.name": model} if model is not None else {})
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.errors import OutputError
    from ptune.models.backbone import Backbone
    from ptune.soft_prompts.soft_prompt import import_peft as read
    from ptune.training.assembly import template_for

    if (output / "ptune.json").exists():
        raise OutputError(f'"{output}" holds another soft prompt; choose another --output')
    backbone = Backbone.load(settings.model)
    prompt = read(
        adapter,
        backbone=backbone,
        template=template_for(settings, backbone).source,
        task=settings.task,
        max_length=settings.prompt.max_length,
        overlong=settings.prompt.overlong,
    )
    prompt.save(output)
    typer.echo(f"{len(prompt.rows)} virtual tokens imported to {output}")
