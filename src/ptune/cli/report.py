"""`ptune report`: one page on a soft prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    prompt: Annotated[Path, typer.Argument(help="Folder of a soft prompt.")],
    output: Annotated[
        Path | None, typer.Option(help="The page; report.html in the prompt's folder where absent.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What ptune eval --json wrote; what dev said in training where absent.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, where it is not the one that is named.")] = None,
    count: Annotated[int, typer.Option(min=1, help="So many nearest words of a virtual token.")] = 4,
) -> None:
    """Write one self-contained HTML page: curves, confusion matrix, calibration, nearest words, settings, versions."""
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.files import file_place, write_text
    from ptune.reports.page import report_page
    from ptune.reports.pictures import check_matplotlib
    from ptune.reports.story import read_story
    from ptune.soft_prompts.nearest_words import words_of_prompt
    from ptune.soft_prompts.soft_prompt import SoftPrompt

    check_matplotlib()
    loaded = SoftPrompt.load(prompt)
    path = file_place(output or prompt / "report.html")
    words, no_words = words_of_prompt(loaded, model, count)
    page = report_page(read_story(prompt, loaded, evaluation=evaluation, words=words, no_words=no_words))
    write_text(path, page)
    typer.echo(f"report written to {path}")
