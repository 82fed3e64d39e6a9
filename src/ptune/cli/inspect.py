"""`ptune inspect PROMPT` says what a soft prompt is; `ptune inspect data CONFIG.yaml` shows what a model will see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ptune.cli.overrides import check_config_first, run_overrides
from ptune.cli.unused import refuse_unused
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
    count: Annotated[
        int | None, typer.Option(min=1, help="So many examples, or nearest words of a virtual token; 3 where absent.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All there is to say about a soft prompt, as JSON.")] = False,
) -> None:
    """Say what a soft prompt is, with the nearest words of each virtual token; or show rendered examples of a config.

    `ptune inspect data CONFIG.yaml` decodes examples back to text: virtual tokens on cyan, what is supervised on green.
    """
    if target == "data":
        refuse_unused("it goes with a soft prompt, and these are data", json=as_json)
        _inspect_data(config, context.args, model, data, count or 3)
    elif config is not None or context.args:
        raise ConfigError(
            f'"ptune inspect {target}" takes nothing more; for rendered examples: ptune inspect data CONFIG.yaml'
        )
    else:
        refuse_unused('a soft prompt holds no data; for those: "ptune inspect data CONFIG.yaml"', data=data)
        if as_json:
            refuse_unused("--json says nothing of nearest words", model=model, count=count)
        _inspect_prompt(Path(target), model, count or 3, as_json=as_json)


def _inspect_data(config: Path | None, rest: list[str], model: str | None, data: str | None, count: int) -> None:
    from ptune.config.file import load_config

    if config is None:
        raise ConfigError("ptune inspect data needs a config file: ptune inspect data CONFIG.yaml")
    check_config_first(config, "inspect data")
    settings = load_config(config, run_overrides(rest, model=model, data=data))

    from ptune.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.markup import escape
    from rich.text import Text

    from ptune.config.task import head_outputs
    from ptune.models.backbone import Backbone
    from ptune.rendering.preview import preview
    from ptune.tasks.registry import completed
    from ptune.training.assembly import task_of_run, template_for, train_and_dev_records

    backbone = Backbone.load(settings.model)
    template = template_for(settings, backbone)
    console = Console(highlight=False, soft_wrap=True)
    train, _ = train_and_dev_records(settings)
    settings = settings.model_copy(update={"task": completed(settings.task, train)})
    task = task_of_run(settings, template, backbone)
    for record in train[:count]:
        text, row = Text(), task.shown(record)
        for segment in preview(task.renderer, row) if row is not None else ():
            marked = segment.kind == "answer" and not console.is_terminal  # a file shows no colours
            text.append(f">>{segment.text}<<" if marked else segment.text, style=_COLOURS[segment.kind])
        console.rule(f"[dim]{escape(getattr(record, 'location', ''))}", align="left")
        console.print(text)
        if row is not None:
            supervised = sum(label >= 0 for label in row.labels)
            console.print(f"[dim]{len(row.ids)} tokens, {supervised} supervised{', cut' if row.cut else ''}[/]")
        if head_outputs(settings.task) is not None:  # what is right stands nowhere in the row
            console.print(f"[dim]right: {escape(task.answer(record))}[/]")


def _facts(described: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give what there is to say about a soft prompt, each fact with its name, for people."""
    from ptune.cli.progress import format_value

    task, summary, norms = described["task"], described["summary"], described["norms"]
    yield "template", described["template"].replace("\n", "\\n")
    yield "task", task["type"]
    if "verbalizer" in task:
        yield "labels", ", ".join(f"{label} {words!r}" for label, words in task["verbalizer"].items())
    if head := described["head"]:
        outputs = task.get("labels") or task["tags"]
        yield "tags" if "tags" in task else "labels", ", ".join(outputs)
        yield "linear head", f"{head['outputs']} outputs, read from hidden states of width {head['width']}"
    yield "backbone", described["backbone"]
    if in_training := _if_known(summary, "{dtype}"):
        rounded = (summary.get("model") or {}).get("quantization")
        in_training += f", weights of {rounded}" if isinstance(rounded, str) else ""
        yield "trained in", in_training + _if_known(summary, " on {device}")
    yield (
        "virtual tokens",
        f"{described['virtual_tokens']} of width {described['width']}, norms {norms['least']:.2g} to "
        f"{norms['greatest']:.2g}",
    )
    if deep := described["deep"]:
        yield (
            "deep prompt",
            f"at each of {deep['layers']} layers, as keys and values of {deep['heads']} heads "
            f"{deep['head_width']} wide",
        )
    encoder = described["encoder"]
    if encoder is not None:
        settings = (f"{name} {value}" for name, value in encoder.items() if name != "type" and value is not None)
        yield "made by", ", ".join([encoder["type"], *settings])
    metric, before, after = (summary.get(name) for name in ("metric", "before", "after"))
    if metric and before and after:
        result = f"{metric} {format_value(metric, before[metric])} -> {format_value(metric, after[metric])}"
        yield "result", result + _if_known(summary, " on {dev_records} held-out records, step {best_step} of {steps}")
    if described["temperature"] is not None:
        yield "temperature", f"{described['temperature']:.3g}, of its labels' probabilities"
    if "training" in summary:
        run = _if_known(summary, "{train_examples} examples of {data}, {seconds} s")
        rate = _if_known(summary["training"], ", learning rate {learning_rate:g}, seed {seed}")
        yield "run", (run + rate).removeprefix(", ")
    if "data_hash" in summary:
        yield "data hash", summary["data_hash"]
    if "imported" in summary:
        yield "imported", ", ".join(f"{name} {value}" for name, value in summary["imported"].items() if value)
    if "date" in summary:
        yield "date", summary["date"]
    if "versions" in summary:
        yield "versions", ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    why_not = ", for PEFT's adapter of a soft prompt has no place for its linear head" if described["head"] else ""
    yield "loads in PEFT", "yes" if described["loads_in_peft"] else f"no{why_not}"


def _if_known(values: dict[str, Any], sentence: str) -> str:
    try:
        return sentence.format(**values)
    except KeyError:  # written by hand, or imported
        return ""


def _inspect_prompt(folder: Path, model: str | None, count: int, *, as_json: bool) -> None:
    from ptune.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ptune.soft_prompts.nearest_words import words_of_prompt
    from ptune.soft_prompts.soft_prompt import SoftPrompt

    console = Console(highlight=False, soft_wrap=True)
    prompt = SoftPrompt.load(folder)
    if as_json:
        typer.echo(json.dumps(prompt.describe(), ensure_ascii=False, indent=2))
        return
    facts = Table(show_header=False, box=None)
    for name, value in _facts(prompt.describe()):
        facts.add_row(f"[bold]{name}", escape(value))
    console.print(facts)
    found, no_words = words_of_prompt(prompt, model, count)
    if found is None:
        console.print(f"[dim]{escape(no_words)}[/]")
        return
    table = Table(
        "virtual token",
        "nearest words (cosine)",
        title="Nearest words. Read little into them: the model reads directions that no word has.",
    )
    for number, neighbours in enumerate(found):
        words = ", ".join(f"{word.text!r} {word.cosine:.2f}" for word in neighbours.by_cosine)
        table.add_row(str(number), escape(words))
    console.print(table)
