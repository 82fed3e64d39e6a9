"""`ptune demo`: see P-tuning work, in about a minute, with the model that comes with ptune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the soft prompt; an older demo there is replaced.")] = Path(
        "prompts/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
) -> None:
    """Train ten virtual tokens on a small sentiment set, with the model that comes with ptune."""
    from ptune.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from ptune.cli.progress import ProgressReporter
    from ptune.demonstration import SENTENCE, best_hand_written, demo_config, demo_records
    from ptune.engine.engine import Engine
    from ptune.models.backbone import Backbone
    from ptune.training.train import train

    console = Console(highlight=False, soft_wrap=True)
    backbone = Backbone.load("mini")
    test = demo_records("test")
    console.print("[bold]1. The frozen model[/], asked by hand-written templates")
    frozen = best_hand_written(backbone, demo_records("dev"), test)
    shown = frozen.template.replace("\n", "\\n")
    console.print(
        f"   best of them: [cyan]{shown}[/]  accuracy on {len(test)} held-out sentences {frozen.accuracy:.1%}\n"
    )
    console.print("[bold]2. P-tuning[/]: ten virtual tokens learn the task")
    with ProgressReporter(console) as reporter:
        train(demo_config(output, seed), backbone=backbone, reporter=reporter, overwrite=True)
    console.print("\n[bold]3. The result[/]")
    with Engine(backbone) as engine:
        name = engine.load(output)
        tuned = engine.evaluate(name, test)["accuracy"]
        (answer,) = engine.classify(name, [SENTENCE])
    console.print(f"   accuracy on the same held-out sentences: [bold]{frozen.accuracy:.1%} -> {tuned:.1%}[/]")
    console.print(f'   "{SENTENCE}" -> [bold green]{answer["label"]}[/] ({answer["probability"]:.0%})')
    console.print("\n[bold]Try next[/]")
    console.print(f'   ptune predict {output} "送货很快，苹果也新鲜。 下次还来。"', style="cyan")
    console.print(f"   ptune inspect {output}", style="cyan")
    console.print("   ptune train examples/sst2_mini.yaml --data FOLDER", style="cyan")
